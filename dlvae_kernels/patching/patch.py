"""Bind faster methods on the quantizers of a model."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from . import dot_product, euclidean, factorized, gumbel, image, residual_stack, vector_quantize_pytorch
from .handler import Handler, Method, is_own
from .patched import Change, Patched
from .verify import compare

_HANDLERS: tuple[Handler, ...] = (
    euclidean.HANDLER,
    factorized.HANDLER,
    image.HANDLER,
    dot_product.HANDLER,
    gumbel.HANDLER,
    vector_quantize_pytorch.HANDLER,
)
_LOOKS_LIKE_A_QUANTIZER = re.compile(r"quantiz|codebook|vq", re.IGNORECASE)
_ALREADY = "already patched"


def patch(model: nn.Module, *, fused: bool = True, verify: Any = None) -> Patched:
    """Make the quantizers of a loaded model fast; its weights, `state_dict`, classes and return types stay.

    A module is recognised by the name of a method, by its codebook, and by the results of the method on a sample. It
    gets a method of this library on the instance; all others are left alone, with a reason. A stock float32 search
    picks a farther code in one to three of a thousand vectors of 32 levels; a patched one picks the nearest. Modules of
    half precision get an exact search of the values that they hold.

    Args:
        model: a model with loaded weights, not yet compiled.
        fused: also replace `encode` of residual stacks: the levels run in one method, and in one operation on a GPU.
        verify: inputs of the model (a tensor, a tuple, or a dictionary of names), or a callable without arguments that
            runs it. The model runs once, and each search also runs patched on the same vectors. The report counts the
            tokens that differ, and with which side a float64 search agrees.
    Returns:
        a report, whose `undo()` restores the methods; also a context manager. A second call on a patched model changes
        nothing.

    >>> class Codebook(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.register_buffer("embed", torch.randn(32, 8))
    ...
    ...     def quantize(self, x):
    ...         return torch.cdist(x, self.embed).argmin(-1)
    >>> model = Codebook()
    >>> with patch(model) as patched:
    ...     print(patched)
    dlvae_kernels.patch: 1 methods replaced
      1 x Codebook.quantize: exact search of the nearest code
    """
    handlers = (residual_stack.HANDLER, *_HANDLERS) if fused else _HANDLERS
    changes: list[Change] = []
    left_alone: dict[str, str] = {}
    compiled = [module for module in model.modules() if is_compiled(module)]
    in_compiled = {id(each) for module in compiled for each in module.modules()}
    with torch.no_grad():
        for name, module in model.named_modules():
            for handler in handlers:
                method = recognise(module, handler, id(module) in in_compiled)
                if isinstance(method, Method):
                    changes.append(bind(name, module, handler, method))
                elif method is not None:
                    left_alone[name] = method
                if method is not None:
                    break
    for name, module in reversed(list(model.named_modules())):
        if _LOOKS_LIKE_A_QUANTIZER.search(type(module).__name__) and is_unknown(module, changes, left_alone, model):
            left_alone[name] = "no handler knows its methods and state"
    patched = Patched(changes, left_alone)
    if verify is not None:
        try:
            patched.comparisons += compare(model, [each[1:4] for each in changes], verify)
        except BaseException:
            patched.undo()
            raise
    return patched


def recognise(module: nn.Module, handler: Handler, compiled: bool) -> Method | str | None:
    """The method to bind, or why the module is left alone, or None if the handler does not know it."""
    own = module.__dict__.get(handler.method)
    if own is not None:
        if is_own(own):
            return _ALREADY
        return None if handler.recognise(module) is None else f"its {handler.method} was replaced on the instance"
    method = handler.recognise(module)
    if compiled and isinstance(method, Method):
        return "it is compiled; patch the model before torch.compile"
    return method


def bind(name: str, module: nn.Module, handler: Handler, method: Method) -> Change:
    module.__dict__[handler.method] = method
    # A codebook that is cached must follow weights that are loaded later.
    has_cache = handler is euclidean.HANDLER and "_embed" in module.__dict__
    hook = module.register_load_state_dict_post_hook(euclidean.drop_cache) if has_cache else None
    return Change(name, module, handler, method, hook)


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is the wrapper of torch.compile, or was compiled in place."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def is_unknown(module: nn.Module, changes: list[Change], left_alone: dict[str, str], model: nn.Module) -> bool:
    """Whether no part of the module, and nothing around it, was changed or listed."""
    known = {id(each.module) for each in changes} | {id(model.get_submodule(name)) for name in left_alone}
    inside = any(id(each) in known for each in module.modules())
    return not inside and all(id(module) not in {id(part) for part in each.module.modules()} for each in changes)
