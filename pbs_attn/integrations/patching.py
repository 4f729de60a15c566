# SPDX-License-Identifier: Apache-2.0
"""patch_model and unpatch_model: one model, its own config, and an exact way back."""

import weakref

from transformers import PreTrainedModel

from .. import methods
from ..config import PBSConfig
from ..methods import Method
from .forward import DENSE
from .registry import DEFAULT_NAME, POLICY, check_config, register

_patches = weakref.WeakKeyDictionary()  # model -> its patches, oldest first


class Patch:
    """What patch_model did to a model. `undo()`, or leaving the `with` block, reverts it."""

    def __init__(self, model):
        self._model = weakref.ref(model)
        self._configs = []  # (config, had its own attribute, implementation)
        self._policies = []  # (module, had one, policy)
        self.active = True

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.undo()

    def undo(self):
        """Put back what was there before. Patches of one model come off in reverse order."""
        if not self.active:
            return
        model = self._model()
        stack = _patches.get(model, []) if model is not None else []
        if stack and stack[-1] is not self:
            raise RuntimeError(
                "undo: the model was patched again since; undo the newer patch first"
            )
        if stack:
            stack.pop()
        self._revert()

    def _revert(self):
        for config, implementation in reversed(self._configs):
            config._attn_implementation_internal = implementation
        for module, had_one, policy in reversed(self._policies):
            if had_one:
                setattr(module, POLICY, policy)
            else:
                delattr(module, POLICY)
        self._configs, self._policies, self.active = [], [], False

    def _set_implementation(self, config, name):
        self._configs.append((config, config._attn_implementation_internal))
        config._attn_implementation_internal = name

    def _set_policy(self, module, policy):
        had_one = POLICY in module.__dict__
        self._policies.append((module, had_one, module.__dict__.get(POLICY)))
        setattr(module, POLICY, policy)


def patch_model(model, config=None, *, layers=None):
    """Run permuted block-sparse attention in `model`, loaded before or after, until undone.

    config: PBSConfig, or a method or its text ("xattention:stride=16"); None = the registered one.
    layers: {layer index: PBSConfig, method or "dense"} for layers that differ.
    Vision and audio towers keep what they have. Returns a Patch (`undo()`, context manager).
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model is a {type(model).__name__}; allowed: a transformers model")
    config = check_config("config", config)
    layers = _check_layers(layers)
    register()
    modules = _attention_modules(model)
    _check_interface(model, modules)
    known = sorted({module.layer_idx for module in modules})
    for index in layers:
        if index not in known:
            raise ValueError(f"layers has the key {index}; allowed: {known[0]} to {known[-1]}")

    patch = Patch(model)
    # Masks are made from the config of the text model or, in some composite models, the outermost.
    for each in _distinct([model.config, *_text_configs(model), *(m.config for m in modules)]):
        patch._set_implementation(each, DEFAULT_NAME)
    for module in modules:
        policy = layers.get(module.layer_idx, config)
        if policy is not None or POLICY in module.__dict__:  # an outer patch ends here
            patch._set_policy(module, policy)
    taken = {module.config._attn_implementation for module in modules}
    if taken != {DEFAULT_NAME}:
        patch._revert()
        raise RuntimeError(f"patch_model: {type(model).__name__} kept attn_implementation {taken}")
    _patches.setdefault(model, []).append(patch)
    return patch


def unpatch_model(model):
    """Undo every patch_model of this model; says so if there is none."""
    stack = _patches.get(model)
    if not stack:
        raise ValueError(f"unpatch_model: this {type(model).__name__} is not patched")
    while stack:
        stack[-1].undo()


def _check_layers(layers):
    if layers is None:
        return {}
    if not isinstance(layers, dict):
        raise TypeError(f"layers is a {type(layers).__name__}; allowed: a dictionary")
    for index, policy in layers.items():
        if isinstance(index, bool) or not isinstance(index, int):
            raise TypeError(f"layers has the key {index!r}; allowed: layer indices")
        is_name = isinstance(policy, str) and methods.is_method(policy)
        if not isinstance(policy, (PBSConfig, Method)) and policy != DENSE and not is_name:
            allowed = "a PBSConfig or 'dense', or a method"
            raise TypeError(f"layers[{index}] is {policy!r}; allowed: {allowed}")
    return {index: _policy(index, policy) for index, policy in layers.items()}


def _policy(index, policy):
    return policy if policy == DENSE else check_config(f"layers[{index}]", policy)


def _check_interface(model, modules):
    """Models of the old style accept any name and ignore it; say so before, not after."""
    owners = [m for m in _models(model) if _is_text(m.config, model)] or [model]
    if not modules or not all(owner._can_set_attn_implementation() for owner in owners):
        raise ValueError(
            f"model is a {type(model).__name__}, whose decoder layers do not call transformers' "
            "attention interface; allowed: models that do"
        )


def _models(model):
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


def _is_text(config, model):
    return type(config) is type(model.config.get_text_config())


def _text_configs(model):
    """Of the text model and its submodels: usually one object, sometimes copies of it."""
    owned = [m.config for m in _models(model) if _is_text(m.config, model)]
    return [model.config.get_text_config(), *owned]


def _distinct(configs):
    return list({id(config): config for config in configs}.values())


def _attention_modules(model):
    """Modules of the text model that name their layer: what an attention call hands over."""
    return [
        module
        for module in model.modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        and _is_text(getattr(module, "config", None), model)
    ]
