# SPDX-License-Identifier: Apache-2.0
"""The fixture `backend`: every test that takes it runs on the emulated GPU, and on a real one where
there is one. `-k emu` or `-m gpu` picks."""

import emu_backend
import pytest


@pytest.fixture(params=emu_backend.params())
def backend(request):
    chosen = emu_backend.get(request.param)
    chosen.schedule()
    return chosen
