"""Dynamic rank: adapters that grow and shrink during RL, by how the spectrum of each module's B·A is used.

At a change, the singular values of scaling * B·A of every module are found by QR of both factors, without forming the
product. A budget of rank is then dealt out where a unit of it carries most energy. A module that grows gets new rows of
A and zero columns of B: its function stays. One that shrinks keeps the leading part of its B·A (Eckart & Young, 1936).
AdaLoRA (Zhang et al., 2023, arXiv:2303.10512) also prunes by singular values, but only masks; here memory shrinks.

Legend: R rank, K new rank, I inputs and O outputs of a matrix.
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from tuneloop.models.lora_init import initial_a
from tuneloop.models.lora_linear import LoraLinear
from tuneloop.training.policy import Policy
from tuneloop.training.settings import RankScheduleSettings


def mean_rank(schedule: RankScheduleSettings, start: float, update: int, updates: int) -> float:
    """The budget as a mean rank a module: from `initial` to `final` in even steps, then constant.

    Args:
        start: the mean rank of the adapter that the run starts from.
        update: updates done.
        updates: of the whole run.
    """
    initial = schedule.initial or start
    final = schedule.final or initial
    gone = min(1.0, update / (schedule.anneal * updates))
    return initial + (final - initial) * gone


@dataclass(frozen=True)
class Spectrum:
    """What is known of a module when ranks are dealt out.

    Attributes:
        values_R: singular values of scaling * B·A, falling.
        cost: what one rank takes from the budget.
        limit: the largest rank that it may have.
    """

    values_R: Sequence[float]
    cost: float
    limit: int

    def energy(self, place: int) -> float:
        """Squared singular value at a place (from 0); beyond the last, the geometric decay of those there are."""
        values = self.values_R
        if place < len(values):
            return values[place] ** 2
        if values[0] == 0.0 or len(values) == 1:
            return 0.0 if values[0] == 0.0 else values[0] ** 2 / 4 ** (place - len(values) + 1)
        decay = (values[-1] / values[0]) ** (1 / (len(values) - 1))
        return (values[-1] * decay ** (place - len(values) + 1)) ** 2


def deal_ranks(spectra: Mapping[str, Spectrum], budget: float, schedule: RankScheduleSettings) -> dict[str, int]:
    """The rank of every module: the least for all, then one by one where the energy for its cost is largest.

    Args:
        budget: the most that ranks times costs may sum to; the least ranks are dealt out even when they exceed it.
    """
    ranks = {name: min(schedule.min_rank, spectrum.limit) for name, spectrum in spectra.items()}
    left = budget - sum(ranks[name] * spectrum.cost for name, spectrum in spectra.items())
    candidates = [
        (-spectrum.energy(place) / spectrum.cost, place, name)
        for name, spectrum in spectra.items()
        for place in range(ranks[name], min(spectrum.limit, len(spectrum.values_R) + schedule.growth))
    ]
    for _, place, name in sorted(candidates):
        if place == ranks[name] and spectra[name].cost <= left:
            ranks[name] += 1
            left -= spectra[name].cost
    return ranks


def spectrum_of(a_RI: torch.Tensor, b_OR: torch.Tensor, scaling: float) -> torch.Tensor:
    """Singular values (R,) in fp64, falling, of scaling * B·A."""
    left_RR = torch.linalg.qr(b_OR.double(), mode="r").R
    right_RR = torch.linalg.qr(a_RI.double().T, mode="r").R
    return scaling * torch.linalg.svdvals(left_RR @ right_RR.T)


@dataclass(frozen=True)
class Change:
    """A module's factors at another rank, and how what was accumulated for the old ones carries over.

    With K < R: new A = N A and new B = B M with N M = 1, so a gradient by the new factors is M^T times that of A and
    that of B times N^T.

    Attributes:
        a_KI, b_OK: the new factors, fp32.
        a_map_KR, b_map_RK: what gradients of A are multiplied with from the left, and those of B from the right.
        dropped: squared Frobenius norm of the part of B·A that is gone.
    """

    a_KI: torch.Tensor
    b_OK: torch.Tensor
    a_map_KR: torch.Tensor
    b_map_RK: torch.Tensor
    dropped: float = 0.0

    def moments(self, name: str, value: torch.Tensor, squared: bool) -> torch.Tensor:
        """An accumulated gradient of factor "A" or "B", or of its square, for the new factor.

        A mean of gradients is mapped as a gradient is. A mean of squares is mapped by the squared entries of the map,
        which is exact for gradients whose entries are uncorrelated. New entries start at 0.
        """
        factor = (self.a_map_KR if name == "A" else self.b_map_RK).to(value.device)
        factor = (factor.square() if squared else factor).float()
        return factor @ value if name == "A" else value @ factor


def grow(a_RI: torch.Tensor, b_OR: torch.Tensor, rows_GI: torch.Tensor) -> Change:
    """More rank: `rows_GI` below A, zeros beside B, so that B·A is what it was."""
    added, rank = rows_GI.shape[0], a_RI.shape[0]
    a_KI = torch.cat([a_RI, rows_GI.to(a_RI)])
    b_OK = torch.cat([b_OR, b_OR.new_zeros(b_OR.shape[0], added)], 1)
    keep_KR = torch.eye(rank + added, rank, device=a_RI.device)
    return Change(a_KI, b_OK, keep_KR, keep_KR.T)


def shrink(a_RI: torch.Tensor, b_OR: torch.Tensor, rank: int) -> Change:
    """Less rank: the best approximation of B·A, with orthogonal rows of A as long as its rows were (root mean square).

    With B = Qb Rb, A^T = Qa Ra and Rb Ra^T = U S V^T: new A = c V_K^T Qa^T, new B = Qb U_K S_K / c. Directions that B
    does not use yet keep their rows of A, and so can still be learned.
    """
    a, b = a_RI.double(), b_OR.double()
    left_OR, left_RR = torch.linalg.qr(b)
    right_IR, right_RR = torch.linalg.qr(a.T)
    u_RR, s_R, vh_RR = torch.linalg.svd(left_RR @ right_RR.T)
    length = float(a.square().sum().div(a.shape[0]).sqrt()) or 1.0
    v_RK = vh_RR[:rank].T
    a_KI = length * (right_IR @ v_RK).T
    b_OK = left_OR @ (u_RR[:, :rank] * s_R[:rank]) / length
    # A = Ra^T Qa^T, so with M = A A_new^+ = Ra^T V_K / c:  B M = B_new. And with N = c V_K^T Ra^-T:  N A = A_new.
    m_RK = right_RR.T @ v_RK / length
    n_KR = length * v_RK.T @ torch.linalg.pinv(right_RR.T)
    return Change(a_KI.float(), b_OK.float(), m_RK.T.float(), n_KR.T.float(), float(s_R[rank:].square().sum()))


def remap_state(
    state: Mapping[str, torch.Tensor], shapes: Sequence[tuple[str, torch.Size]], changes: Mapping[str, Change]
) -> dict[str, torch.Tensor]:
    """An optimiser's state (`Optimizer.state`) for the factors of `changes` in the place of the old ones.

    Args:
        shapes: (name, old shape) of every parameter, in the optimiser's order.
        changes: by module; its factors are the parameters `<module>.lora_A` and `<module>.lora_B`.
    """
    remapped = dict(state)
    for key in ("master", "exp_avg", "exp_avg_sq"):
        parts = []
        for name, part in _split(state[key], shapes).items():
            module, _, factor = name.rpartition(".lora_")
            change = changes.get(module)
            if change is None:
                parts.append(part.flatten())
            elif key == "master":
                parts.append((change.a_KI if factor == "A" else change.b_OK).flatten())
            else:
                parts.append(change.moments(factor, part, key == "exp_avg_sq").flatten())
        remapped[key] = torch.cat(parts)
    return remapped


def _split(flat: torch.Tensor, shapes: Sequence[tuple[str, torch.Size]]) -> dict[str, torch.Tensor]:
    parts = flat.split([math.prod(shape) for _, shape in shapes])
    return {name: part.view(shape) for (name, shape), part in zip(shapes, parts, strict=True)}


class RankScheduler:
    """Changes the ranks of a policy's layers, and says how the optimiser's state follows.

    Args:
        policy: as the run starts, before any checkpoint is loaded: its ranks are where the budget begins.
        updates: of the whole run.
    """

    def __init__(self, policy: Policy, settings: RankScheduleSettings, updates: int):
        self.policy, self.settings, self.updates = policy, settings, updates
        largest = max((layer.A.shape[0] for layer in policy.layers.values()), default=0)
        self._largest = settings.largest(largest)
        costs = {name: self._cost(layer) for name, layer in policy.layers.items()}
        ranks = {name: layer.A.shape[0] for name, layer in policy.layers.items()}
        self._total_cost = sum(costs.values())
        self._start = sum(ranks[name] * cost for name, cost in costs.items()) / max(1.0, self._total_cost)

    @property
    def on(self) -> bool:
        """Whether ranks ever change."""
        return self.settings.kind != "off"

    def due(self, update: int) -> bool:
        """Whether ranks change at the end of this update (from 1); never of the last."""
        return self.on and update % self.settings.every == 0 and update < self.updates

    def change(
        self, update: int, state: Mapping[str, torch.Tensor], shapes: Sequence[tuple[str, torch.Size]]
    ) -> tuple[dict[str, torch.Tensor], float]:
        """Deal the ranks out anew and give the layers factors of them; the state then belongs into a new optimiser.

        Args:
            update: from 1.
            state: of the optimiser (`Optimizer.state`); its masters are what is decomposed.
            shapes: (name, shape) of every parameter in the optimiser's order.

        Returns:
            The state for the new factors, and the Frobenius norm of what was dropped relative to that of the whole
            adapter's scaling * B·A.
        """
        masters = _split(state["master"], shapes)
        layers = self.policy.layers
        factors = {name: (masters[f"{name}.lora_A"], masters[f"{name}.lora_B"]) for name in layers}
        spectra = {name: self._spectrum(layers[name], *factors[name]) for name in layers}
        budget = mean_rank(self.settings, self._start, update, self.updates) * self._total_cost
        ranks = deal_ranks(spectra, budget, self.settings)
        changes = {
            name: self._change(name, update, factors[name], rank)
            for name, rank in ranks.items()
            if rank != layers[name].A.shape[0]
        }
        dropped = sum(layers[name].scaling ** 2 * change.dropped for name, change in changes.items())
        whole = sum(value**2 for spectrum in spectra.values() for value in spectrum.values_R)
        for name in changes:
            layers[name].resize(ranks[name])
        return remap_state(state, shapes, changes), math.sqrt(dropped / whole) if whole else 0.0

    def metrics(self) -> dict[str, float]:
        """What the ranks are now."""
        ranks = [layer.A.shape[0] for layer in self.policy.layers.values()]
        numel = sum(layer.A.numel() + layer.B.numel() for layer in self.policy.layers.values())
        return {
            "rank/total": float(sum(ranks)),
            "rank/min": float(min(ranks)),
            "rank/max": float(max(ranks)),
            "rank/parameters": float(numel),
        }

    def state(self) -> dict[str, torch.Tensor]:
        """The ranks, in the layers' order."""
        return {"ranks": torch.tensor([layer.A.shape[0] for layer in self.policy.layers.values()])}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Give the layers factors of these ranks, to be filled by whoever holds their values."""
        for layer, rank in zip(self.policy.layers.values(), state["ranks"].tolist(), strict=True):
            layer.resize(rank)

    def _cost(self, layer: LoraLinear) -> float:
        return 1.0 if self.settings.budget == "rank" else float(layer.base.in_features + layer.base.out_features)

    def _spectrum(self, layer: LoraLinear, a_RI: torch.Tensor, b_OR: torch.Tensor) -> Spectrum:
        limit = min(self._largest, layer.base.in_features, layer.base.out_features)
        return Spectrum(spectrum_of(a_RI, b_OR, layer.scaling).tolist(), self._cost(layer), limit)

    def _change(self, name: str, update: int, factors: tuple[torch.Tensor, torch.Tensor], rank: int) -> Change:
        a_RI, b_OR = factors
        held = a_RI.shape[0]
        if rank < held:
            return shrink(a_RI, b_OR, rank)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {update}".encode()))
        weight = self.policy.layers[name].base.weight
        return grow(a_RI, b_OR, initial_a(self.policy.init, weight, rank - held, generator, first=held))
