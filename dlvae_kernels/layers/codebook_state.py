"""The tensors of a codebook: their names, dtypes and checkpoints."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from .state import StateNames, WideState, lookup, register

Init = Literal["uniform", "normal", "data", "kmeans"]
INITS = ("uniform", "normal", "data", "kmeans")
Threshold = float | Literal["auto"]
# The buffers that no checkpoint holds; some codebooks lack some.
_UNSAVED = ("_num_revived", "_use", "_observed", "_used")


class CodebookState(WideState):
    """Codes [K, D] or [H, K, D], and the statistics that their learning needs; see `Codebook` for the arguments."""

    _use: Tensor
    _observed: Tensor
    _num_revived: Tensor

    def __init__(
        self,
        num_codes: int,
        num_features: int,
        num_heads: int | None,
        decay: float | None,
        init: Init,
        dead_code_threshold: Threshold,
        trainable: bool | None,
        names: StateNames | None,
    ) -> None:
        super().__init__()
        self._num_codes = num_codes
        self._num_features = num_features
        self._num_heads = num_heads
        self._decay = decay
        self._init = init
        self._dead_code_threshold = dead_code_threshold
        self._names = names = names or StateNames()
        # True until the first training batch has initialised the codebook, or it has been set otherwise.
        self._is_uninitialised = init in ("data", "kmeans")
        default = torch.get_default_dtype()
        wide = torch.promote_types(default, torch.float32)
        heads = () if num_heads is None else (num_heads,)
        codes = torch.empty(*heads, num_codes, num_features, dtype=default if decay is None else wide)
        trainable = decay is None if trainable is None else trainable
        if trainable and decay is not None:
            self._wide_parameters = (names.codes,)
        register(self, names.codes, nn.Parameter(codes) if trainable else codes)
        # Counts and sums start as those of one vector at each code, and so reproduce the codebook.
        is_saved = decay is not None or dead_code_threshold != 0
        register(self, names.cluster_size, torch.empty(*heads, num_codes, dtype=wide), persistent=is_saved)
        if decay is not None:
            register(self, names.embed_sum, torch.empty_like(codes))
        if dead_code_threshold == "auto":
            # No checkpoint holds these, because the notebook's layers have none: their averages begin anew.
            self.register_buffer("_use", torch.zeros(*heads, num_codes, dtype=wide), persistent=False)
            self.register_buffer("_observed", torch.zeros(*heads, 1, dtype=wide), persistent=False)
        self.register_buffer("_num_revived", torch.zeros((), dtype=torch.int64), persistent=False)
        if names.initialised is not None:
            register(self, names.initialised, torch.tensor(not self._is_uninitialised))
        self.register_load_state_dict_post_hook(_leave_meta)

    @property
    def codebook(self) -> Tensor:
        """The codes, [K, D] or [H, K, D]."""
        return lookup(self, self._names.codes)

    @property
    def _sizes(self) -> Tensor:
        """The moving average of the number of vectors assigned to each code in a batch, [K] or [H, K]."""
        return lookup(self, self._names.cluster_size)

    @property
    def _sums(self) -> Tensor:
        """The moving average of the sum of the vectors assigned to each code, of the shape of the codebook."""
        return lookup(self, self._names.embed_sum)

    def _tensors(self) -> list[Tensor]:
        """Codes and statistics."""
        return [self.codebook, self._sizes] + ([self._sums] if self.is_averaged else [])

    @property
    def is_averaged(self) -> bool:
        """Whether the codes follow moving averages; otherwise they learn by gradient."""
        return self._decay is not None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        names = self._names
        averages = (names.codes, names.embed_sum) if self._decay is not None else ()
        # Moving averages stay float32 buffers of this module, even where load_state_dict assigns the caller's tensors.
        for name in (*averages, names.cluster_size):
            if (value := state_dict.get(prefix + name)) is not None:
                dtype = torch.promote_types(value.dtype, torch.float32)
                state_dict[prefix + name] = value.detach().to(dtype, copy=True)
        size, total = (state_dict.get(prefix + name) for name in (names.cluster_size, names.embed_sum))
        if averages and size is not None and total is not None and total.shape[:-1] == size.shape:
            # The layer of the VQ-VAE notebook starts with counts of 0 and random sums; a sum without vectors is 0.
            total.masked_fill_(size[..., None] == 0, 0)
        if self._decay is None:
            # A codebook that saves its counts loads the checkpoint of one that does not, and the reverse.
            if self._dead_code_threshold != 0:
                state_dict.setdefault(prefix + names.cluster_size, self._sizes)
            else:
                state_dict.pop(prefix + names.cluster_size, None)
        if (flag := state_dict.get(f"{prefix}{names.initialised}")) is not None:
            # Older releases of some sources save one number.
            state_dict[f"{prefix}{names.initialised}"] = flag.reshape(()).bool()
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + names.codes in state_dict:
            # `to_empty` leaves any values in the buffers that no checkpoint holds.
            for name in filter(self._buffers.__contains__, _UNSAVED):
                getattr(self, name).zero_()
        if flag is not None:
            self._is_uninitialised = not flag.is_meta and not bool(flag)
            return
        codes = state_dict.get(prefix + names.codes)
        if codes is not None and codes.shape == self.codebook.shape:
            is_zero = codes.is_meta or not codes.any()
            self._is_uninitialised = self._init in ("data", "kmeans") and is_zero


def _leave_meta(module: CodebookState, incompatible_keys: object) -> None:
    """Make anew the buffers that no checkpoint holds, if load_state_dict has assigned tensors to a meta module."""
    if module.codebook.is_meta:
        return
    names = [(module._names.cluster_size, 1), *((name, 0) for name in _UNSAVED if hasattr(module, name))]
    for name, value in names:
        owner, _, leaf = name.rpartition(".")
        if (buffer := lookup(module, name)).is_meta:
            setattr(module.get_submodule(owner), leaf, torch.full_like(buffer, value, device=module.codebook.device))
