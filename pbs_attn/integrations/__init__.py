# SPDX-License-Identifier: Apache-2.0
"""Engines that can run permuted block-sparse attention; each module imports its engine."""
