"""What the literature names and measurements so far do not favor. It works and is tested, but may
change or go; docs/experimental.md says what was measured."""

import warnings

#: What it is -> the names that a user asks for it by. The peers, `routing.peers.PEERS`, are
#: experimental, too: reports compare a router with them, no config takes one.
EXPERIMENTAL = dict(
    objective=('no_offset', 'cost_weight', 'loss_sum', 'pairwise', 'gain'),
    gate=('FixedExit', 'ScoreGate', 'AgreementGate', 'HaltingGate', 'GumbelGate'),
    propagation=('Propagation',),
    encoding=('binary', 'Huffman'),
)


def warn_if_experimental(kind: str, name: str | None) -> None:
    """Say in a line, if so, that what a user asks for is experimental.

    Args:
        kind (str): A key of `EXPERIMENTAL`.
        name (str, optional): What was asked for.
    """
    if name in EXPERIMENTAL[kind]:
        warnings.warn(
            f"{kind} '{name}' is experimental: measurements so far do not favor it "
            '(docs/experimental.md)'
        )
