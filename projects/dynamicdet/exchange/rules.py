"""Rows that turn the entries of a checkpoint from elsewhere into ours, and their application."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Optional

from torch import Tensor, nn

from ..errors import UsageError

Change = Callable[[Tensor], Tensor | Sequence[Tensor]]


class Rule(NamedTuple):
    """One row; made by `rename` and `skip`."""

    pattern: str
    targets: tuple[str, ...] = ()
    change: Change | None = None
    reason: str | Callable[[Tensor], str] = ''


def rename(pattern: str, *targets: str, change: Change | None = None) -> Rule:
    """Entries that are taken.

    Args:
        pattern (str): Regular expression of the source's whole key.
        targets (str): Names in mmdet's detector, or in the dynamic one. ``<1>`` is the pattern's
            first group, ``<1-2>`` that number less 2, ``<0>`` the whole key.
        change (callable, optional): Gives one tensor, which goes to all targets, or as many as
            there are targets. Defaults to the tensor as it is.
    """
    return Rule(pattern, targets, change)


def skip(pattern: str, reason: str | Callable[[Tensor], str]) -> Rule:
    """Entries that are known and unneeded; the reason, which may depend on the value, says what
    they are and why, for the user."""
    return Rule(pattern, reason=reason)


class WeightSource(NamedTuple):
    """Where checkpoints come from.

    Attributes:
        rules (callable): The table, rows in order, for a model: the first row that matches a key
            counts. Raises a `UsageError` if the model is none that the source's weights work in.
        kept (tuple[str]): Beginnings of names of ours that this source never has. They stay as the
            model's constructor left them.
        defaults (callable): Values, for a model, of what some of the source's files have and others
            do not.
    """

    rules: Callable[[nn.Module], list[Rule]]
    kept: tuple[str, ...] = ('router.',)
    defaults: Callable[[nn.Module], dict[str, Tensor]] = lambda model: {}


def apply_rules(
    rules: Sequence[Rule], state: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], 'Counter[str]']:
    """Apply a table.

    Args:
        rules (Sequence[Rule]): The rows.
        state (Mapping[str, Tensor]): The source's entries.

    Returns:
        tuple: Our entries, and how many of the source's were skipped for which reason.

    Raises:
        UsageError: If no row matches an entry, a value does not have the form that its row expects,
            or two entries give the same name.
    """
    taken: dict[str, Tensor] = {}
    skipped: Counter[str] = Counter()
    unknown = []
    for key, value in state.items():
        rule, match = _first_match(rules, key)
        if rule is None:
            unknown.append(key)
        elif not rule.targets:
            skipped[rule.reason(value) if callable(rule.reason) else rule.reason] += 1
        else:
            names = [_fill(template, match) for template in rule.targets]
            twice = [name for name in names if name in taken]
            if twice:
                raise UsageError(f"a second entry gives '{twice[0]}': '{key}'")
            taken.update(zip(names, _changed(rule, key, value), strict=True))
    if unknown:
        raise UsageError(
            f'{len(unknown)} of its {len(state)} entries are unknown to this source (such as '
            f'{", ".join(map(repr, unknown[:3]))}): is --from right?'
        )
    return taken, skipped


def _first_match(rules: Sequence[Rule], key: str) -> tuple[Rule | None, Optional['re.Match[str]']]:
    for rule in rules:
        match = re.fullmatch(rule.pattern, key)
        if match:
            return rule, match
    return None, None


def _fill(template: str, match: 're.Match[str]') -> str:
    def group(reference: 're.Match[str]') -> str:
        text = match[int(reference[1])]
        return str(int(text) + int(reference[2])) if reference[2] else text

    return re.sub(r'<(\d)([+-]\d+)?>', group, template)


def _changed(rule: Rule, key: str, value: Tensor) -> Sequence[Tensor]:
    try:
        values = rule.change(value) if rule.change else value
    except (RuntimeError, IndexError) as error:
        raise UsageError(
            f"the entry '{key}' has the shape {tuple(value.shape)}, which is not what this "
            'source has there'
        ) from error
    return [values] * len(rule.targets) if isinstance(values, Tensor) else values
