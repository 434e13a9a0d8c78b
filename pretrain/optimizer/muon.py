"""Muon for the matrices inside the layers and AdamW for the rest, under any ZeRO stage.

Muon (Jordan et al. 2024) takes the momentum, finds the nearest matrix with all singular values near
1 by Newton-Schulz steps, and multiplies it by the square root of max(1, rows / columns). It is
implemented here, because the Muon of DeepSpeed 0.19.8 clips after orthogonalising (at stages 1 and
2) and keeps an optimizer state that no other stage can continue from. Here it is a step of an
ordinary torch optimizer, `MuonBesideAdamW`, which DeepSpeed calls once per training step with
reduced, accumulated and clipped gradients at every stage.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from pretrain.checkpoints.zero_state import Fragment
from pretrain.optimizer.matrix_dealing import Exchange, Matrix
from pretrain.ranks.dist import Ranks

# The coefficients of a polynomial that brings singular values in (0, 1] to within about 0.3 of 1 in
# five steps.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_SMALLEST_NORM = 1e-7
_IN_A_LAYER = re.compile(r"(^|\.)layers?\.\d+\.")
# These parameters contain several maps, one below the other: query, key and value; input and gate.
_MAPS = {"Wqkv": 3, "Wi": 2}


def is_layer_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Return whether a parameter of the model is a matrix inside one of its layers."""
    return parameter.ndim == 2 and _IN_A_LAYER.search(name) is not None


def matrices_of(name: str, shape: Sequence[int]) -> list[Matrix]:
    """Return the parts of a parameter that are orthogonalised separately.

    ModernBERT's fused `Wqkv` and `Wi` are cut into their maps, which are separate in BERT. If they
    were orthogonalised as a whole, the map with the larger gradient would reduce the update of the
    others.
    """
    rows, columns = shape
    maps = _MAPS.get(name.split(".")[-2], 1)
    assert rows % maps == 0, (name, shape)
    height = rows // maps
    return [Matrix(name, i * height * columns, height, columns) for i in range(maps)]


def orthogonalise(
    matrices_NRC: torch.Tensor, steps: int, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Return float32 [N, R, C], each matrix with its singular values brought near 1.

    Parameters
    ----------
    dtype
        Precision of the products. None: bfloat16 on a GPU, because the values only have to be near
        1; float32 on a CPU, where the same step on another number of ranks gives the same losses.
    """
    if dtype is None:
        dtype = torch.float32 if matrices_NRC.device.type == "cpu" else torch.bfloat16
    first, third, fifth = _COEFFICIENTS
    is_tall = matrices_NRC.shape[1] > matrices_NRC.shape[2]
    x = matrices_NRC.mT if is_tall else matrices_NRC
    x = (x / x.norm(dim=(1, 2), keepdim=True).clamp(min=_SMALLEST_NORM)).to(dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(
            x, torch.baddbmm(gram, gram, gram, beta=third, alpha=fifth), x, beta=first
        )
    return (x.mT if is_tall else x).float()


def muon_direction(matrices: dict[int, torch.Tensor], steps: int) -> dict[int, torch.Tensor]:
    """Return the update direction of each matrix [R, C], before the learning rate is applied.

    Matrices of equal shape are computed together.
    """
    by_shape: dict[torch.Size, list[int]] = defaultdict(list)
    for number, matrix in matrices.items():
        by_shape[matrix.shape].append(number)
    found = {}
    for (rows, columns), numbers in by_shape.items():
        turned = orthogonalise(torch.stack([matrices[n] for n in numbers]), steps)
        turned *= max(1.0, rows / columns) ** 0.5
        found |= dict(zip(numbers, turned, strict=True))
    return found


class MuonBesideAdamW(torch.optim.Optimizer):
    """One torch optimizer with two algorithms: Muon for groups with ``kind="muon"``, and AdamW.

    All ranks must call `deal` before the first step, after DeepSpeed has laid out the weights.
    DeepSpeed passes the groups one by one or together, made of whole parameters (stage 0) or of
    vectors that contain parts of many parameters.
    """

    def __init__(
        self,
        matrices: dict[str, nn.Parameter],
        muon: dict[str, Any],
        others: list[dict[str, Any]],
        **adamw: Any,
    ) -> None:
        self.matrices = [m for name, p in matrices.items() for m in matrices_of(name, p.shape)]
        groups = [{"params": list(matrices.values()), "kind": "muon", **muon}, *others]
        super().__init__(groups, {"kind": "adamw"})
        self._adamw = torch.optim.AdamW(self.param_groups[1:], **adamw)
        self._exchanges: dict[torch.Tensor, tuple[list[torch.Tensor], Exchange]] = {}

    def deal(
        self,
        vectors: list[torch.Tensor],
        fragments: Iterable[Fragment],
        ranks: Ranks,
        is_replicated: bool,
    ) -> None:
        """Choose which rank computes which matrix; all ranks call this function together.

        Parameters
        ----------
        vectors
            The tensors that the Muon groups consist of now; at stage 0 the parameters.
        fragments
            All fragments of the model that this rank stores.
        is_replicated
            Every rank has the same fragments (stage 0), and one step updates all of them together.
        """
        parts: dict[int, list[Fragment]] = {id(v): [] for v in vectors}
        for fragment in fragments:
            if id(fragment.flat) in parts:
                parts[id(fragment.flat)].append(fragment)
        calls = [vectors] if is_replicated else [[v] for v in vectors]
        self._exchanges = {}
        for call in calls:
            held = [f for v in call for f in parts[id(v)]]
            exchange = Exchange(self.matrices, held, call, ranks, is_replicated)
            self._exchanges[call[0]] = (call, exchange)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Apply the gradients of the groups that DeepSpeed has passed for this call."""
        assert closure is None
        for group in self.param_groups:
            # At stage 3 all groups but one are empty in a call.
            if group["kind"] == "muon" and group["params"]:
                self._step_muon(group)
        # DeepSpeed removes groups and puts them back; AdamW must use the current dictionaries.
        self._adamw.param_groups = [g for g in self.param_groups if g["kind"] == "adamw"]
        self._adamw.state = self.state
        self._adamw.step()

    def _step_muon(self, group: dict[str, Any]) -> None:
        flats, exchange = self._exchanges[group["params"][0]]
        turned = []
        for flat in flats:
            state = self.state[flat]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(flat, dtype=torch.float32)
            gradient = torch.zeros_like(flat) if flat.grad is None else flat.grad
            momentum = state["momentum"].lerp_(gradient, 1 - group["momentum"])
            turned.append(gradient.lerp(momentum, group["momentum"]))
        matrices = exchange.gather(turned)
        exchange.scatter(muon_direction(matrices, group["newton_schulz_steps"]), turned)
        for flat, direction in zip(flats, turned, strict=True):
            flat.mul_(1 - group["lr"] * group["weight_decay"])
            flat.add_(direction, alpha=-group["lr"])
