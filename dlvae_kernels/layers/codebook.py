"""The module that holds a codebook and its statistics, and learns, initialises, revives and all-reduces it.

Every layer with a codebook is one or has one: a vector quantizer one codebook [K, D] or one a head [H, K, D], a
residual quantizer one a level [L, K, D].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..functional.checks import check_at_least, check_between, check_choice
from ..functional.ema_update import ema_step
from .codebook_state import INITS, CodebookState, Init, Threshold
from .distributed import all_reduce_sum, all_reduce_sums, check_exportable, num_ranks, sample_vectors
from .initialisation import codes_from
from .projection import to_unit_length
from .state import StateNames, lookup, replace_rows
from .usage import CodebookUsage, CollapseWarning, usage_of

# Weight of the past in the counts of a codebook that learns by gradient.
_USE_DECAY = 0.99
# With threshold "auto": a code is dead if its use, a moving average of its counts, is below this share of the mean use;
# and the largest share of the codebook that one step revives.
_DEAD_SHARE = 0.1
_REVIVED_SHARE = 0.05
# The averages of the use go back so many steps that this many vectors come to a code on average, within bounds. No code
# is dead before they have this part of their final weight. A revived code begins with this share of the mean use.
_VECTORS_OF_A_CODE, _FEWEST_STEPS, _MOST_STEPS = 20, 10, 100
_OBSERVED = 0.15
_REVIVED_USE = 0.3


def is_recomputed() -> bool:
    """Whether activation checkpointing repeats this forward inside a backward; compiled code cannot tell."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class Codebook(CodebookState):
    """A codebook [K, D], or several [H, K, D], with the statistics of its codes.

    The codes follow exponential moving averages of the vectors assigned to them (`decay` given), or learn by gradient
    (`decay` None). Statistics are float32 (float64 where that is the default dtype) and stay so after
    `module.to(torch.bfloat16)`; so are the codes if they follow averages.

    Activation checkpointing recomputes a forward inside the backward; only the first forward updates the state. Do not
    compile a layer by itself inside a checkpointed region: compiled code cannot detect the recomputation.

    Args:
        num_codes: K.
        num_features: D.
        num_heads: H, or None for one codebook [K, D].
        decay: weight of the past in the averages, in [0, 1]; None for a codebook that learns by gradient.
        epsilon: Laplace smoothing of the cluster sizes, >= 0.
        init: "normal", "uniform" in [-1/K, 1/K], or from the first training batch: "data" (random vectors), "kmeans".
        dead_code_threshold: reinitialise (revive) a code from the batch if its moving average of assigned vectors a
            batch is below this; 0 disables it. "auto": if its use in the last steps (10 to 100, by the number of
            vectors that a step brings to a code) is below a tenth of the mean use, and in one step at most 5 % of the
            codes (at least one), the least used.
        sync: all-reduce statistics over the ranks of torch.distributed whenever it is initialised.
        unit_length: keep every code at length 1, for vectors of length 1.
        trainable: the codes are a parameter, which a gradient reaches; None: unless they follow averages.
        names: the names of the state.
    Raises:
        ValueError: an argument is out of its range.

    >>> codebook = Codebook(8, 4, decay=0.99)
    >>> list(codebook.state_dict())
    ['codes', 'cluster_size', 'embed_sum']
    """

    # K-means initialisation: the number of iterations, and whether the statistics start as those of its clusters, not
    # as those of one vector at each code.
    _kmeans_iterations = 10
    _starts_from_clusters = False
    # The remedy that the warning of a collapsed codebook names.
    _collapse_remedy = 'dead_code_threshold="auto" and init="kmeans"'

    def __init__(
        self,
        num_codes: int,
        num_features: int,
        num_heads: int | None = None,
        *,
        decay: float | None,
        epsilon: float = 1e-5,
        init: Init = "normal",
        dead_code_threshold: Threshold = "auto",
        sync: bool = True,
        unit_length: bool = False,
        trainable: bool | None = None,
        names: StateNames | None = None,
    ) -> None:
        check_choice("init", init, INITS)
        if dead_code_threshold != "auto":
            check_at_least("dead_code_threshold", dead_code_threshold, 0)
        check_at_least("epsilon", epsilon, 0)
        if decay is not None:
            check_between("decay", decay, 0, 1)
        super().__init__(num_codes, num_features, num_heads, decay, init, dead_code_threshold, trainable, names)
        self._epsilon = epsilon
        self._sync = sync
        self._unit_length = unit_length
        # Recomputation under activation checkpointing must consume the same random numbers as the step did.
        self._initialised_in_last_step = False
        self._warning = CollapseWarning(self._collapse_remedy)
        self.reset_parameters()

    @property
    def writes_codes(self) -> bool:
        """Whether `update` writes into the codebook."""
        return self.is_averaged or self._dead_code_threshold != 0

    def arguments(self) -> dict[str, Any]:
        """The arguments of the constructor that concern learning, by name."""
        return {
            "decay": self._decay,
            "epsilon": self._epsilon,
            "init": self._init,
            "dead_code_threshold": self._dead_code_threshold,
            "sync": self._sync,
        }

    @property
    def usage(self) -> CodebookUsage:
        """How evenly the codes are used, from the moving averages of their counts."""
        return usage_of(self._sizes, _DEAD_SHARE, self._num_revived)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise codes and statistics anew, as the constructor does; call it after `to_empty`."""
        self._is_uninitialised = self._init in ("data", "kmeans")
        self._initialised_in_last_step = False
        self._num_revived.zero_()
        codes = torch.empty_like(self.codebook)
        # Zero until the first training batch, also in a checkpoint.
        self.set_codes(codes.zero_() if self._is_uninitialised else self._draw(codes))
        if self._names.initialised is not None:
            lookup(self, self._names.initialised).fill_(not self._is_uninitialised)

    def _draw(self, codes: Tensor) -> Tensor:
        """Fill `codes` with random numbers."""
        bound = 1 / self._num_codes
        return codes.normal_() if self._init == "normal" else codes.uniform_(-bound, bound)

    @torch.no_grad()
    def set_codes(self, codes: Tensor, counts: Tensor | None = None) -> None:
        """Copy `codes` into the codebook, and reset all statistics to `counts` vectors at each code, by default one."""
        codes = to_unit_length(codes) if self._unit_length else codes
        self.codebook.copy_(codes)
        self._sizes.copy_(self._sizes.new_ones(()) if counts is None else counts)
        if self._decay is not None:
            self._sums.copy_(codes if counts is None else codes * counts[..., None])
        if self._dead_code_threshold == "auto":
            self._use.zero_()
            self._observed.zero_()

    def begin(
        self, num_vectors: int, initial_codes: Callable[[], tuple[Tensor, Tensor]], is_frozen: bool = False
    ) -> bool:
        """Begin a forward; initialise an uninitialised codebook. Returns whether this forward updates the state.

        Only a forward in training mode does, and not its recomputation under activation checkpointing, which repeats
        the random numbers.

        Args:
            num_vectors: the number of vectors of the batch.
            initial_codes: returns the initial codes and counts; see `initial_codes` below.
            is_frozen: the forward will not call `update`.
        Raises:
            ValueError: the layer is exported in train mode while its codebook is uninitialised or ranks all-reduce.
        """
        if not self.training:
            return False
        check_exportable(type(self).__name__, self._sync)
        if torch.compiler.is_exporting() and self._is_uninitialised:
            raise ValueError(
                f"{type(self).__name__} cannot be exported in train mode before a training batch has initialised its"
                f" codebook (init={self._init!r}): run one training step first, or call .eval()"
            )
        self._read_initialised()
        if is_recomputed():
            if self._initialised_in_last_step:
                self._jitter(self._num_codes)
            if self._dead_code_threshold != 0 and not is_frozen:
                self._jitter(self._num_revivable)
            return False
        self._initialise(num_vectors, initial_codes)
        return not is_frozen

    def _read_initialised(self) -> None:
        """Look at the buffer that tells whether the codebook is initialised, where no device has to be waited for."""
        name = self._names.initialised
        if name is not None and not torch.compiler.is_compiling() and lookup(self, name).is_cpu:
            self._is_uninitialised = not bool(lookup(self, name))

    def _is_set(self) -> Tensor:
        """Whether the codebook is initialised: [] bool."""
        # It may have been set in place, as torch.distributed.checkpoint does: then it is not all zeros.
        return self.codebook.any() if self._names.initialised is None else lookup(self, self._names.initialised)

    @torch.no_grad()
    def _initialise(self, num_vectors: int, initial_codes: Callable[[], tuple[Tensor, Tensor]]) -> None:
        self._initialised_in_last_step = False
        # Compiled code cannot branch on values; torch.where below restores a codebook that was set.
        if self._is_uninitialised and not torch.compiler.is_compiling() and self._is_set():
            self._is_uninitialised = False
        # A rank with no vectors still joins the all-reduce.
        if not self._is_uninitialised or (num_vectors == 0 and num_ranks(self._sync) == 1):
            return
        codes, counts = initial_codes()
        before = [(tensor, tensor.clone()) for tensor in self._tensors()]
        is_set = self._is_set().clone()
        self.set_codes(codes, counts if self._starts_from_clusters else None)
        for tensor, old in before:
            tensor.copy_(torch.where(is_set, old, tensor))
        # A batch without a valid vector initialises nothing.
        if self._names.initialised is not None:
            lookup(self, self._names.initialised).copy_(is_set | codes.any())
        self._initialised_in_last_step = True
        # Compiled code cannot see that.
        self._is_uninitialised = not torch.compiler.is_compiling() and not bool(self._is_set())

    def initial_codes(self, vectors: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Random vectors of the batch over all ranks, or their k-means: codes and counts, shaped as the state.

        Args:
            vectors: [..., D] or [..., H, D].
            mask: [...] bool without the heads: True for a valid vector.
        """
        sampled = sample_vectors(vectors, self._jitter(self._num_codes), self._sync, mask)
        return self._codes_from(all_reduce_sum(sampled, self._sync), vectors, mask)

    def _codes_from(self, sampled: Tensor, vectors: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        iterations = 0 if self._init == "data" else self._kmeans_iterations
        return codes_from(sampled, vectors, iterations, self._unit_length, self._sync, mask)

    @torch.no_grad()
    def update(
        self,
        statistics: Tensor,
        candidates: Callable[[Tensor], Tensor],
        ran: Tensor | None = None,
        average: Callable[[Tensor], None] | None = None,
    ) -> None:
        """Update the state by the statistics of a training batch.

        Args:
            statistics: this rank's [K, D + 1] or [H, K, D + 1] of `ema_statistics`; [..., K, 1], the counts alone, for
                a codebook that learns by gradient.
            candidates: returns for jitter [M] or [H, M] what `sample_vectors` returns for the vectors of the batch.
            ran: [H] bool, the codebooks that this rank used; those that no rank used keep their state. None: all.
            average: adds the statistics of all ranks to the moving averages; None: as `decay` says.
        """
        # One all-reduce adds statistics and candidates. Counts that decide nothing stay those of this rank.
        sync = self._sync and (self._decay is not None or self._dead_code_threshold != 0)
        parts = [statistics]
        if self._dead_code_threshold != 0:
            parts.append(candidates(self._jitter(self._num_revivable)).to(statistics.dtype))
        if ran is not None:
            parts.append(ran.to(statistics.dtype))
        parts = all_reduce_sums(parts, sync)
        ran = None if ran is None else parts[-1] > 0
        averages = [self._sizes] if self._decay is None else self._tensors()
        before = [] if ran is None else [tensor.clone() for tensor in averages]
        (average or self._average)(parts[0])
        if ran is not None:
            for tensor, old in zip(averages, before, strict=True):
                tensor.copy_(torch.where(ran.view(-1, *[1] * (tensor.ndim - 1)), tensor, old))
        if self._dead_code_threshold == "auto":
            self._observe(parts[0][..., -1].to(self._use.dtype), ran)
        if self._dead_code_threshold != 0:
            found, is_valid = parts[1].split([self._num_features, 1], dim=-1)
            self._revive(found, is_valid, ran)
        self._warning.after_step(self._sizes)

    def _average(self, statistics: Tensor) -> None:
        """Add the statistics of a step, over all ranks, to the moving averages, and move the codes that follow them."""
        if self._decay is None:
            self._sizes.lerp_(statistics.squeeze(-1).to(self._sizes.dtype), 1 - _USE_DECAY)
            return
        ema_step(self.codebook, self._sizes, self._sums, statistics, decay=self._decay, epsilon=self._epsilon)
        if self._unit_length:
            self.codebook.copy_(to_unit_length(self.codebook))

    @property
    def _num_revivable(self) -> int:
        """The most codes that one step revives."""
        return max(1, int(_REVIVED_SHARE * self._num_codes)) if self._dead_code_threshold == "auto" else self._num_codes

    def _revive(self, candidates: Tensor, is_valid: Tensor, ran: Tensor | None) -> None:
        """Replace dead codes, their sums and their counts by valid candidates, so that the next update keeps them."""
        is_auto = self._dead_code_threshold == "auto"
        use = self._use if is_auto else self._sizes
        least, which = (part[..., : self._num_revivable] for part in use.sort(dim=-1, stable=True))
        if is_auto:
            mean = use.mean(-1, keepdim=True)
            is_dead = (least < _DEAD_SHARE * mean) & (self._observed > _OBSERVED)
            size = _DEAD_SHARE * self._sizes.mean(-1, keepdim=True)
        else:
            size = least.new_full((1,), float(self._dead_code_threshold))
            is_dead = least < size
        is_dead = is_dead & (is_valid.squeeze(-1) > 0)
        if ran is not None:
            is_dead &= ran[:, None]
        codes = to_unit_length(candidates) if self._unit_length else candidates
        replace_rows(self.codebook, which, is_dead, codes)
        replace_rows(self._sizes, which, is_dead, size)
        if is_auto:
            replace_rows(use, which, is_dead, _REVIVED_USE * mean)
        if self._decay is not None:
            replace_rows(self._sums, which, is_dead, codes * size[..., None])
        self._num_revived.add_(is_dead.sum())

    def _observe(self, counts: Tensor, ran: Tensor | None) -> None:
        """Add the counts [..., K] of a step, over all ranks, to the moving averages of the use of the codes."""
        weight = (counts.mean(-1, keepdim=True) / _VECTORS_OF_A_CODE).clamp(1 / _MOST_STEPS, 1 / _FEWEST_STEPS)
        if ran is not None:
            weight = torch.where(ran[:, None], weight, 0)
        self._use.lerp_(counts, weight)
        self._observed.lerp_(torch.ones_like(weight), weight)

    def _jitter(self, count: int) -> Tensor:
        """Random numbers in [0, 1) to sample vectors: [count] or [H, count]."""
        heads = self.codebook.shape[:-2]
        return torch.rand(*heads, count, device=self.codebook.device)
