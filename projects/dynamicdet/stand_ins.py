"""Stand-ins for what lies in a file beside its weights: paths, settings, dates, whole modules.

A checkpoint is read without executing what is in it: torch builds tensors and plain containers, and
refuses all other classes. Users' files hold some, and need none of them built: a path in the
options of a training, the class of a settings object. In the place of each comes a class that takes
what it is given and does nothing; what the file names is neither imported nor called.
"""

import contextlib
import pickle
import re
import sys
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch

#: Of Python's own library: modules whose classes hold data, and single names. All else that it has
#: is refused, as what a file that wants to do something would ask for.
_DATA_MODULES = (
    'argparse',
    'array',
    'collections',
    'dataclasses',
    'datetime',
    'decimal',
    'enum',
    'fractions',
    'ipaddress',
    'pathlib',
    'typing',
    'uuid',
    'zoneinfo',
)
_DATA_NAMES = (
    'copyreg._reconstructor',
    'copyreg.__newobj__',
    'functools.partial',
    'io.BytesIO',
    'io.StringIO',
    'logging.Logger',
    'logging.getLogger',
    'random.Random',
    're._compile',
    'time.struct_time',
    'types.MappingProxyType',
    'types.SimpleNamespace',
    *(
        f'builtins.{name}'
        for name in (
            'bool',
            'bytearray',
            'bytes',
            'complex',
            'dict',
            'float',
            'frozenset',
            'int',
            'list',
            'object',
            'range',
            'set',
            'slice',
            'str',
            'tuple',
        )
    ),
)
#: A file cannot ask for more classes than this; each is one more reading at worst.
_MOST = 500
_lock = threading.RLock()


class StandIn:
    """An object that was not built.

    Attributes:
        name (str): Of the class, as the file has it: module and name.
        state (dict): What the object held, as far as the file gives it as a dict.
    """

    __slots__ = ('state',)
    name = 'object'

    def __new__(cls, *_: Any, **__: Any) -> 'StandIn':
        """Take any arguments, and do nothing with them."""
        self = super().__new__(cls)
        self.state = {}
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {}

    # As which lists and mappings are filled. What they held is not kept.
    def append(self, _: Any) -> None:
        """Take what a pickle appends, and forget it."""
        pass

    extend = append

    def __setitem__(self, *_: Any) -> None:
        pass

    @property
    def is_module(self) -> bool:
        """Whether it stands for a whole ``nn.Module``."""
        return {'_parameters', '_buffers', '_modules'} <= self.state.keys()

    def __repr__(self) -> str:
        return f'<{self.name}>'


def is_data(name: str) -> bool:
    """Whether a class, ``module.name``, can be stood in for. Of other packages every class can,
    there or not."""
    package = name.partition('.')[0]
    return name in _DATA_NAMES or package in _DATA_MODULES or package not in sys.stdlib_module_names


def stand_in(name: str, container: type | None = None) -> Callable:
    """What is called in the place of a class.

    Args:
        name (str): The class, ``module.name``.
        container (type, optional): What it gives, where the file fills it: `list` or `OrderedDict`.
            Defaults to a `StandIn`.
    """
    if name in ('copyreg._reconstructor', 'copyreg.__newobj__'):
        return _made
    members: dict[str, Any] = dict(
        __slots__=(), name=name, __module__='stand-in', __qualname__=name
    )
    if container is not None:
        members['__new__'] = lambda cls, *_, **__: container()
    return type(name, (StandIn,), members)


def _made(cls: Any, *_: Any) -> Any:
    """How pickle makes an empty object of a class."""
    return cls() if isinstance(cls, type) and issubclass(cls, StandIn) else StandIn()


def read_with_stand_ins(load: Callable[[], Any], asked: Iterable[str] = ()) -> Any:
    """Read a file by torch, with stand-ins for the classes that it asks for.

    Args:
        load (Callable): Calls ``torch.load`` with ``weights_only=True``; called again as long as it
            finds another class.
        asked (Iterable[str]): Classes that are known before.

    Raises:
        Exception: Whatever ``load`` raises of a file that holds something else.
    """
    stand_ins = {name: stand_in(name, _CONTAINERS.get(name)) for name in asked if is_data(name)}
    for _ in range(_MOST):
        try:
            known = [
                (StandIn, 'stand-in'),
                *((stand_in, name) for name, stand_in in stand_ins.items()),
            ]
            # torch's list is one for all threads.
            with (
                _lock if stand_ins else contextlib.nullcontext(),
                torch.serialization.safe_globals(known),
            ):
                return load()
        except pickle.UnpicklingError as error:
            name, container = _missing(str(error))
            if name is None or not is_data(name) or (name in stand_ins and container is None):
                raise
            stand_ins[name] = stand_in(name, container)
    raise pickle.UnpicklingError(f'it asks for more than {_MOST} classes')


def asked_classes(path: str) -> list[str]:
    """The classes that a torch file asks for and torch does not build. Files before zip archives do
    not say without being read."""
    if not zipfile.is_zipfile(path):
        return []
    return torch.serialization.get_unsafe_globals_in_checkpoint(path)


_CONTAINERS = {'collections.deque': list, 'collections.defaultdict': OrderedDict}


def _missing(message: str) -> tuple[str | None, type | None]:
    """Which class torch lacks, by what it says; and what its stand-in must give, if it is a list or
    mapping."""
    asked = re.search(r'GLOBAL (\S+) was not an allowed global', message)
    if asked:
        name = asked[1] if '.' in asked[1] else f'builtins.{asked[1]}'
        return name, _CONTAINERS.get(name)
    filled = re.search(
        r"Can only (append|extend|SETITEM).* but got <class 'stand-in\.(\S+)'>", message
    )
    if filled:
        return filled[2], OrderedDict if filled[1] == 'SETITEM' else list
    return None, None


def why_unread(error: Exception) -> str:
    """What a reader of files stumbled on, in one line; torch says it in many, and what to do about
    it wrongly."""
    message = str(error).strip()
    refused = re.search(r'GLOBAL (\S+)', message)
    if refused:
        return refusal_message(refused[1])
    if 'Only persistent_load of storage is allowed' in message:
        return (
            'it holds a whole module as torch before 1.6 wrote it: load it there, and save it by a '
            'newer torch'
        )
    reason = re.search(r'WeightsUnpickler error: (.*)', message)
    first = ((reason[1] if reason else message).splitlines() or [''])[0][:200]
    # The unpickler names bytes that it does not know by their numbers.
    return first if re.search('[a-zA-Z]', first) else f'{type(error).__name__} {first}'.strip()


def refusal_message(name: str) -> str:
    """What to say of a class that is neither read nor stood in for."""
    return f'it asks for {name}, which is no array'


def as_text(content: Any) -> Any:
    """The same containers, in which stand-ins have become text, their names in brackets: it can be
    written again."""
    return _as_text(content, {})


def _as_text(content: Any, done: dict[int, Any]) -> Any:
    if isinstance(content, StandIn) or isinstance(content, type) and issubclass(content, StandIn):
        return f'<{content.name}>'
    kind = type(content)
    if kind not in (dict, OrderedDict, list, tuple, set, frozenset) or id(content) in done:
        return done.get(id(content), content)
    # Containers may hold themselves.
    done[id(content)] = content
    if kind in (dict, OrderedDict):
        for key in list(content):
            value = _as_text(content.pop(key), done)
            content[_as_text(key, done)] = value
    elif kind is list:
        content[:] = [_as_text(item, done) for item in content]
    else:
        done[id(content)] = kind(_as_text(item, done) for item in content)
    return done[id(content)]
