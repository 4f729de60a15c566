# SPDX-License-Identifier: Apache-2.0
"""Methods by name: what a text means and may not say, and that every method describes itself."""

import doctest
import json
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest

from pbs_attn import PBSConfig, config, methods
from pbs_attn.methods import base, kernels

NEEDS_FILE = ("bsfa",)  # no defaults: thresholds=FILE
KERNELS = ("pbs", "pbs+", "identity", "meanpool", "xattention", "peak")
PLAIN = [name for name in methods.METHODS if name not in NEEDS_FILE]


# ---- texts ---------------------------------------------------------------------------------------


def test_lists_are_split_between_methods():
    text = " full, pbs:tau=0.8, segment=512 ,pbs+,,xattention:stride=16,thresholds=a:b.json "
    assert methods.split(text) == [
        "full", "pbs:tau=0.8,segment=512", "pbs+", "xattention:stride=16,thresholds=a:b.json"
    ]  # fmt: skip
    assert methods.split("") == []


def test_parameters_and_labels():
    full, pbs, plus = methods.parse("full,pbs:tau=0.8,segment=512,block=64,pbs+:permute=both")
    assert (full.kind, pbs.kind, plus.kind) == ("dense", "kernel", "kernel")
    assert pbs.config == PBSConfig(tau=0.8, segment_size=512, block_size=64)
    assert plus.config == PBSConfig(permute="both", select="antidiagonal")
    assert pbs.label == "pbs:tau=0.8,segment=512,block=64"
    assert pbs.text == "pbs:block_size=64,segment_size=512,tau=0.8"
    assert methods.get(pbs.text) == pbs  # whatever the label
    assert kernels.Pbs(tau=0.8).label == "pbs:tau=0.8"


def test_defaults_are_those_of_the_evaluation():
    """tau 0.9 everywhere, xattention with stride 8."""
    expected = {
        "pbs": {}, "pbs+": {"select": "antidiagonal"}, "identity": {"permute": "identity"},
        "meanpool": {"permute": "none"},
        "xattention": {"permute": "none", "select": "antidiagonal"},
    }  # fmt: skip
    for name, changes in expected.items():
        assert methods.get(name).config == PBSConfig(**changes)
    for stride in (4, 8, 16):
        assert methods.get(f"xattention:stride={stride}").config.stride == stride


def test_values_take_the_type_of_their_field():
    found = methods.get("pbs:tau=1,min_q=none,min_kv=7,strict=yes,seed=3")
    assert (found.tau, found.min_q, found.min_kv, found.strict, found.seed) == (
        1.0,
        None,
        7,
        True,
        3,
    )
    assert type(found.tau) is float


def test_base_is_where_methods_start():
    start = PBSConfig(tau=0.5, segment_size=512, min_q=0, min_kv=3, permute="both")
    pbs, control, pool, full = methods.parse("pbs:tau=0.7,identity,meanpool,full", start)
    assert (pbs.tau, pbs.segment_size, pbs.permute, pbs.min_kv) == (0.7, 512, "both", 3)
    assert (control.tau, control.permute, pool.permute) == (0.5, "identity", "none")
    assert (full.min_q, full.min_kv) == (0, 3)


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("flash", ValueError, "method is 'flash'; allowed: sdpa, full, pbs"),
        (",", ValueError, "no method in ','"),
        (3, TypeError, "method is a int"),
        ("pbs:tau=high", TypeError, "pbs: tau is 'high'; allowed: a finite number"),
        ("pbs+:tau=-1", ValueError, r"pbs\+: tau is -1"),
        ("pbs:tua=0.9", ValueError, "got 'tua=0.9'; allowed: NAME=VALUE with one of min_q"),
        ("pbs:tau", ValueError, "got 'tau'"),
        ("pbs:segment=100", ValueError, "segment_size is 100"),
        ("pbs:label=x", ValueError, "got 'label=x'"),
        ("pbs:strict=maybe", TypeError, "strict is 'maybe'; allowed: True or False"),
        ("full:tau=0.9", ValueError, "'full' has no parameters; got 'tau=0.9'"),
        ("sdpa:min_q=0", ValueError, "'sdpa' has no parameters"),
        ("meanpool:recipe=ours", ValueError, "recipe is 'ours'; allowed: spec, authors"),
        ("pbs:recipe=authors", ValueError, "got 'recipe=authors'"),
        ("streaming:min_q=-1", ValueError, "streaming: min_q is -1; allowed: an integer >= 0"),
    ],
)
def test_errors_name_what_is_wrong(text, error, said):
    with pytest.raises(error, match=said):
        methods.parse(text)


def test_one_method_is_one():
    with pytest.raises(ValueError, match="names 2; allowed: one"):
        methods.get("pbs,full")


@pytest.mark.parametrize("name", ("meanpool", "xattention"))
def test_recipes_choose_the_class(name):
    ours, theirs = methods.get(f"{name}:recipe=spec"), methods.get(f"{name}:recipe=authors")
    assert ours == methods.get(name) and ours.kind == "kernel"
    assert theirs.NAME == name and theirs.RECIPE == "authors" and theirs.kind == "block"
    assert theirs.text == f"{name}:recipe=authors" and methods.get(theirs.text) == theirs
    assert methods.get(f"{name}:tau=0.5,recipe=authors").tau == 0.5


# ---- every method --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", methods.METHODS)
def test_methods_describe_themselves(name):
    cls = methods.find(name)
    assert cls.NAME == name and cls.kind in base.KINDS and issubclass(cls, methods.Method)
    for text in (cls.ABOUT, cls.SOURCE, cls.DENSITY):
        assert text and "\n" not in text
    if cls.kind in ("kernel", "block", "token"):
        assert cls.KEEP_ALL or name == "best", "which has nothing to set"
        assert {"min_q", "min_kv", "strict"} <= set(cls.parameters())


@pytest.mark.parametrize("name", PLAIN)
def test_methods_are_values(name):
    """Immutable, hashable, equal by parameters, and the same after a trip through text and JSON."""
    method = methods.get(name)
    assert method == methods.find(name)() and hash(method) == hash(methods.find(name)())
    assert methods.get(method.text) == method and method.label == method.text == name
    assert json.loads(json.dumps(method.to_dict()))["method"] == name
    with pytest.raises(FrozenInstanceError):
        method.min_q = 3
    routed = method.replace(min_q=1, min_kv=2, strict=True)
    assert (routed.min_q, routed.min_kv, routed.strict, routed.label) == (1, 2, True, name)
    assert routed != method
    with pytest.raises(TypeError, match="no field 'colour'"):
        method.replace(colour=1)


def test_replacing_a_parameter_changes_the_label():
    found = methods.get("pbs:tau=0.80").replace(tau=0.7)
    assert found.label == "pbs:tau=0.7"


def test_kernel_methods_have_the_fields_of_pbsconfig():
    theirs = {field.name: field.default for field in fields(PBSConfig)}
    ours = {field.name: field.default for field in fields(kernels.KernelMethod)}
    assert ours | theirs == ours and set(ours) - set(theirs) == {"label", "thresholds"}


def test_a_missing_module_says_so(monkeypatch):
    monkeypatch.setitem(methods.METHODS, "later", "later:Later")
    with pytest.raises(ModuleNotFoundError, match="pbs_attn.methods.later"):
        methods.get("later")


def test_nothing_is_imported_before_it_is_named():
    script = (
        "import sys, pbs_attn\n"
        "from pbs_attn import methods\n"
        "methods.parse('pbs,full,xattention')\n"
        "print([m for m in sys.modules if m.startswith('pbs_attn.methods.')])\n"
        "print('transformers' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    loaded, others = result.stdout.splitlines()
    assert set(eval(loaded)) == {"pbs_attn.methods.base", "pbs_attn.methods.kernels"}
    assert others == "False"


def test_examples_in_docstrings_hold():
    for module in (methods, config):
        failed, tried = doctest.testmod(module)
        assert tried and not failed


# ---- PBSConfig.from_method -----------------------------------------------------------------------


@pytest.mark.parametrize("name", KERNELS)
def test_configs_by_method(name):
    assert PBSConfig.from_method(f"{name}:tau=0.8") == methods.get(f"{name}:tau=0.8").config


@pytest.mark.parametrize("text", ("full", "sdpa", "streaming", "xattention:recipe=authors"))
def test_other_methods_are_no_config(text):
    with pytest.raises(ValueError, match="allowed: kernel methods"):
        PBSConfig.from_method(text)


# ---- thresholds ----------------------------------------------------------------------------------


def thresholds(tmp_path, value, name="tau.json"):
    path = tmp_path / name
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_thresholds_per_layer_and_head(tmp_path):
    path = thresholds(tmp_path, [[0.5, 1], [0.25, 0.0]])
    method = methods.get(f"xattention:stride=16,thresholds={path}")
    assert method.tau_heads(0, 2, "cpu").tolist() == [0.5, 1.0]
    assert method.tau_heads(1, 2, "cpu").tolist() == [0.25, 0.0]
    assert methods.get("xattention").tau_heads(0, 2, "cpu") is None
    thresholds(tmp_path, [[0.75, 1]])  # written anew: read anew
    assert method.tau_heads(0, 2, "cpu").tolist() == [0.75, 1.0]
    with pytest.raises(ValueError, match="has thresholds"):
        PBSConfig.from_method(method.text)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("[[0.5", "tau.json: "),
        ({}, "a list over layers"),
        ([], "a list over layers"),
        ([0.5], "a list over layers"),
        ([[0.5, "x"]], r"\[0\]\[1\] is 'x'; allowed: a finite number >= 0"),
        ([[0.5], [-1]], r"\[1\]\[0\] is -1"),
        ("[[NaN]]", r"\[0\]\[0\] is nan"),
        ([[True]], r"\[0\]\[0\] is True"),
    ],
)
def test_bad_thresholds_are_found_before_work_starts(value, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        methods.get(f"xattention:thresholds={thresholds(tmp_path, value)}")
    with pytest.raises(ValueError, match="No such file"):
        methods.get(f"xattention:thresholds={tmp_path / 'absent.json'}")


def test_thresholds_of_another_stride_are_refused(tmp_path):
    found = {"method": "xattention", "block_size": 128, "stride": 16, "layers": [[0.5, 1]]}
    path = thresholds(tmp_path, found)
    assert methods.get(f"xattention:stride=16,thresholds={path}").tau_heads(0, 2, "cpu")[0] == 0.5
    with pytest.raises(ValueError, match="stride is 8; allowed: 16, which .* was measured with"):
        methods.get(f"xattention:thresholds={path}")
    with pytest.raises(ValueError, match="block_size is 64; allowed: 128"):
        methods.get(f"xattention:block=64,stride=16,thresholds={path}")


def test_thresholds_that_do_not_fit_the_call(tmp_path):
    method = methods.get(f"xattention:thresholds={thresholds(tmp_path, [[0.5, 1]])}")
    for layer, heads, said in ((None, 2, "are per layer"), (1, 2, "1 layers; needed: layer 1"),
                               (0, 3, "2 heads in layer 0; needed: 3")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            method.tau_heads(layer, heads, "cpu")


# ---- docs/methods.md -----------------------------------------------------------------------------


def parameters(cls):
    """Parameters with their defaults, as the page has them; not what all of a kind share."""
    shared = (*base.ROUTING, "correction") if cls.kind == "block" else base.ROUTING
    values = {k: v for k, v in cls.parameters().items() if k not in shared}
    if not issubclass(cls, kernels.KernelMethod):
        return ", ".join(f"{name}={value}" for name, value in values.items()) or "none"
    own = [f"{k}={v}" for k, v in values.items() if v != getattr(kernels.KernelMethod, k)]
    return ", ".join(["[config](#kernel-methods)", *own])


def rows():
    """{text: the row of the page's table}."""
    found, settled = {}, {"stock": "is", "dense": "is", "kernel": "cannot"}
    everything = [methods.find(name) for name in methods.METHODS]
    for cls in [*everything, *(methods.find(*each) for each in methods.RECIPES)]:
        text = f"{cls.NAME}:recipe={cls.RECIPE}" if cls.RECIPE else cls.NAME
        keep = f"`{cls.KEEP_ALL}`" if cls.KEEP_ALL else settled[cls.kind]
        cells = (f"`{text}`", cls.kind, cls.ABOUT, parameters(cls), keep, cls.DENSITY, cls.SOURCE)
        found[text] = "| " + " | ".join(cells) + " |"
    return found


@pytest.mark.parametrize("text", rows())
def test_the_page_has_every_method(text):
    page = Path(__file__).parents[1] / "docs" / "methods.md"
    assert rows()[text] in page.read_text(encoding="utf-8").splitlines(), rows()[text]
