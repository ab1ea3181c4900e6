"""Gates that learn when to exit, from the behavior of pooled features along the layers.

Letters: N images, E exits, C_l channels of the layer below head l; ``go`` is the logit of going on,
so the difficulty is ``sigmoid(go)``. ``losses``, (E, N): what each exit gets wrong on each image,
in any unit, such as its detection loss or ``1 - AP``. ``costs``, (E,): what leaving there costs, in
any unit; only its share of the last exit's counts.
"""

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdet.registry import MODELS

from ..errors import UsageError
from ..precision import KeepsType
from .gate_inputs import Evidence
from .gates import Gate, coin_entropy, detection_agreement, most_confident, squash

#: What a gate is told of the detections of an exit, see `detection_features`.
_LOOKS = 4


class LearnedGate(KeepsType, Gate):
    """A small recurrent network over the exits' pooled features.

    Each exit's pooled features x_l, (N, C_l), standardized, go through a linear layer of their own
    into a common width; a GRU cell (Cho et al., arXiv 1406.1078) carries on what came before, so
    that it sees how features behave along the network (Gay 2022); a linear layer per exit says go.
    The last layers start at zero: a gate that has learned nothing says 0.5. Computed in float32
        whatever the detector is in.

    Args:
        in_channels (Sequence[int]): C_l of the heads, (E - 1,), in order.
        width (int): Of the state. Defaults to 32.
        looks_at_detections (bool): Whether the last layers are told four numbers of the exit's
            detections as well, see `detection_features`. Each head passed is then paid for.
            Defaults to False.
        init_cfg (dict, optional): As in mmengine. Defaults to None.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        width: int = 32,
        looks_at_detections: bool = False,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if not in_channels or width < 1:
            raise UsageError(
                'a learned gate takes the channels of one head or more and a width from 1 on; got '
                f'{in_channels} and {width}'
            )
        self.in_channels = tuple(in_channels)
        self.looks_at_detections = looks_at_detections
        # Of all heads, one after the other.
        self.register_buffer('mean', torch.zeros(sum(self.in_channels)))
        self.register_buffer('std', torch.ones(sum(self.in_channels)))
        self.project = nn.ModuleList(nn.Linear(channels, width) for channels in self.in_channels)
        self.cell = nn.GRUCell(width, width)
        self.go = nn.ModuleList(
            nn.Linear(width + _LOOKS * looks_at_detections, 1) for _ in self.in_channels
        )
        self.reset()

    def reset(self) -> None:
        """Forget all that was learned; the weights are drawn anew."""
        self.mean.zero_()
        self.std.fill_(1)
        for layer in (*self.project, self.cell):
            layer.reset_parameters()
        for layer in self.go:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def difficulty(self, evidence: Evidence) -> Tensor:
        """The state is computed anew from the first exit on: that is cheaper than one to be kept
        per image."""
        if evidence.exit >= len(self.in_channels):
            raise UsageError(
                f'the gate was built for {len(self.in_channels)} heads, and the detector has more: '
                'give it the in_channels of all'
            )
        pooled = evidence.pooled[: evidence.exit + 1]
        seen = (
            detection_features(evidence).to(pooled[0].device) if self.looks_at_detections else None
        )
        with torch.autocast(pooled[0].device.type, enabled=False):
            return self._go(evidence.exit, self._states(pooled)[-1], seen).sigmoid()

    def logits(self, pooled: Sequence[Tensor], looks: Sequence[Tensor] | None = None) -> Tensor:
        """``go`` of all exits but the last, (E - 1, N), float32.

        Args:
            pooled (Sequence[Tensor]): Of all heads, (N, C_l) each.
            looks (Sequence[Tensor], optional): (N, 4) each, if the gate looks at detections.

        Raises:
            UsageError: If it looks at detections and was given none.
        """
        if self.looks_at_detections and looks is None:
            raise UsageError(
                'a gate that looks at detections is not trained with the detector: fit it to a '
                'record (tools/calibrate_video.py --fit-record)'
            )
        looks = looks or [None] * len(pooled)
        with torch.autocast(pooled[0].device.type, enabled=False):
            logits = [
                self._go(exit, state, seen)
                for exit, (state, seen) in enumerate(zip(self._states(pooled), looks))
            ]
        return torch.stack(logits)

    def _states(self, pooled: Sequence[Tensor]) -> list[Tensor]:
        """The state at each exit whose features are given, (N, width)."""
        means, stds = self.mean.split(self.in_channels), self.std.split(self.in_channels)
        size = len(pooled[0]), self.cell.hidden_size
        state, states = pooled[0].new_zeros(size, dtype=torch.float32), []
        for x, mean, std, project in zip(pooled, means, stds, self.project):
            state = self.cell(F.relu(project((x.float() - mean) / std)), state)
            states.append(state)
        return states

    def _go(self, exit: int, state: Tensor, seen: Tensor | None) -> Tensor:
        """(N,)."""
        return self.go[exit](state if seen is None else torch.cat([state, seen], dim=1)).squeeze(1)

    def standardize(self, pooled: Sequence[Tensor]) -> None:
        """Let the moments be those of some images' features, (N, C_l) of each head."""
        values = torch.cat([x.double() for x in pooled], dim=1)
        self.mean.copy_(values.mean(dim=0))
        # What is the same for all images says nothing, and must not be divided by 0.
        self.std.copy_(values.std(dim=0, correction=0).clamp(min=1e-6))

    def loss(
        self,
        pooled: Sequence[Tensor],
        losses: Tensor,
        costs: Tensor,
        looks: Sequence[Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Losses to learn from, under keys with ``loss``, and numbers for the log.

        Args:
            pooled (Sequence[Tensor]): Of all heads, (N, C_l) each.
            losses (Tensor): (E, N), see the top of this file.
            costs (Tensor): (E,).
            looks (Sequence[Tensor], optional): (N, 4) each, if the gate looks at detections.
        """
        # Products are in half precision under AMP.
        with torch.autocast(losses.device.type, enabled=False):
            return self._losses(self.logits(pooled, looks), losses.float(), costs / costs[-1])

    @abstractmethod
    def _losses(self, go: Tensor, losses: Tensor, shares: Tensor) -> dict[str, Tensor]:
        """By ``go`` of all exits but the last, (E - 1, N), losses, (E, N), and the exits' shares of
        the last one's cost, (E,)."""


def detection_features(evidence: Evidence) -> Tensor:
    """Four numbers in [0, 1] of each image's detections, (N, 4): mean and sum s, as ``s / (1 +
    s)``, of the scores' entropies, the best score, and the disagreement with the exit before (1 if
    there is none)."""
    count, rows = len(evidence.detections), []
    every = most_confident([*evidence.detections, *(evidence.earlier or ())])
    for detections, earlier in zip(every[:count], every[count:] or [None] * count):
        doubts = coin_entropy(detections.scores)
        rows.append(
            (
                doubts.mean() if len(doubts) else 0.0,
                squash(doubts.sum()),
                detections.scores.max(initial=0.0),
                1.0 if earlier is None else 1 - detection_agreement(detections, earlier),
            )
        )
    return torch.from_numpy(np.array(rows, np.float32).reshape(-1, _LOOKS))


@MODELS.register_module()
class HaltingGate(LearnedGate):
    """Difficulty learned from an oracle (the proposal of Gay 2022).

    For each image an oracle knows the best exit; the target at exit e is whether it goes on beyond
    e, 0 or 1, or the share of several oracles that do, each with another price of compute. Trained
    by cross entropy, difficulty is the expected target. With several prices one threshold then
    serves all budgets: an image goes on while the price at which going on pays is likely to be
        above it.

    While a detector is trained, the oracle of each image takes the exit with the least ``loss +
    price * cost``, for each of the prices. On a record `gate_fitting.fit_halting_gate` does it in
    seconds, by AP.

    Args:
        in_channels, width, looks_at_detections, init_cfg: As of `LearnedGate`.
        prices (Sequence[float]): In units of a loss for the cost of the last exit, above 0.
            Defaults to 0.03, 0.1, 0.3 and 1.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        width: int = 32,
        looks_at_detections: bool = False,
        prices: Sequence[float] = (0.03, 0.1, 0.3, 1.0),
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(in_channels, width, looks_at_detections, init_cfg)
        if not prices or not all(price > 0 for price in prices):
            raise UsageError(f"a HaltingGate's prices are above 0, got {prices}")
        self.prices = tuple(prices)

    def _losses(self, go: Tensor, losses: Tensor, shares: Tensor) -> dict[str, Tensor]:
        """``loss_gate``: how far the gate is from what is cheapest at the prices."""
        targets = torch.stack(
            [goes_on(cheapest_exits(losses, shares, price), len(shares)) for price in self.prices]
        )
        return dict(loss_gate=F.binary_cross_entropy_with_logits(go, targets.mean(dim=0)))

    def target_loss(
        self, pooled: Sequence[Tensor], targets: Tensor, looks: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Cross entropy with targets, (E - 1, N), in [0, 1]: its mean over exits and images."""
        return F.binary_cross_entropy_with_logits(self.logits(pooled, looks), targets.float())


def cheapest_exits(losses: Tensor, costs: Tensor, price: float) -> Tensor:
    """The exit of each image with the least ``loss + price * cost / last cost``, (N,), the first of
    equals."""
    return (losses.detach() + price * (costs / costs[-1])[:, None]).argmin(dim=0)


def goes_on(choice: Tensor, exits: int) -> Tensor:
    """Whether an image whose exit is chosen goes on at exit 0 to E - 2, (E - 1, N), 0 or 1."""
    return (choice[None] > torch.arange(exits - 1, device=choice.device)[:, None]).float()


@MODELS.register_module()
class GumbelGate(LearnedGate):
    """Gates that are trained with the detector, by straight-through Gumbel-softmax over the exits.

    With ``g_e = sigmoid(go_e)`` an image reaches exit e and leaves there with probability

        pi_e = (1 - g_e) * product over j < e of g_j,    pi_(E-1) = product over all j of g_j

    so an exit's decision depends on nothing behind it. An exit is drawn as ``argmax(log pi + G)``
    with Gumbel noise G, one-hot in the forward pass and with the gradient of ``softmax((log pi + G)
    / temperature)`` in the backward pass (Jang et al., arXiv 1611.01144; Maddison et al., arXiv
    1611.00712). What is minimized is the mean of

        loss of the drawn exit + weight * cost of the drawn exit / cost of the last exit

    Detector and gate learn from it together. The decision that it learns is at threshold 0.5; other
    thresholds leave earlier or later.

    Args:
        in_channels, width, looks_at_detections, init_cfg: As of `LearnedGate`.
        cost_weight (float): Price of the last exit's cost in units of a loss, from 0 on. Defaults
            to 0.3.
        temperature (float): Above 0. Defaults to 1.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        width: int = 32,
        looks_at_detections: bool = False,
        cost_weight: float = 0.3,
        temperature: float = 1.0,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(in_channels, width, looks_at_detections, init_cfg)
        if not cost_weight >= 0 or not temperature > 0:
            raise UsageError(
                'a GumbelGate takes a cost_weight from 0 on and a temperature above 0; got '
                f'{cost_weight} and {temperature}'
            )
        self.cost_weight, self.temperature = cost_weight, temperature

    def _losses(self, go: Tensor, losses: Tensor, shares: Tensor) -> dict[str, Tensor]:
        """``loss_gate_task`` and ``loss_gate_cost``, each the mean over images; ``gate_exit``, the
        mean exit drawn.

        Gradients reach the gate, and through ``losses`` the exits, each by how often it was drawn.
        """
        drawn = F.gumbel_softmax(log_exits(go).T, self.temperature, hard=True)  # (N, E)
        numbers = torch.arange(len(shares), dtype=drawn.dtype, device=drawn.device)
        return dict(
            loss_gate_task=(drawn * losses.T).sum(dim=1).mean(),
            loss_gate_cost=self.cost_weight * (drawn @ shares.to(losses)).mean(),
            gate_exit=(drawn.detach() @ numbers).mean(),
        )


def log_exits(go: Tensor) -> Tensor:
    """``log pi`` of E exits, (E, N), from E - 1 logits of going on, (E - 1, N); see
    `GumbelGate`."""
    on, leave = F.logsigmoid(go), F.logsigmoid(-go)
    none = torch.zeros_like(go[:1])
    return torch.cat([none, on.cumsum(dim=0)]) + torch.cat([leave, none])
