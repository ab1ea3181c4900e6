"""One line about frozen parameters, where mmengine logs one for each."""

import logging

from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

#: As mmengine's DefaultOptimWrapperConstructor ends it.
_EACH = 'is skipped since its requires_grad=False'


def count_frozen_parameters(runner: Runner) -> None:
    """Log how many parameters a training leaves as they are, and keep the line of each out of the
    log. To be called before ``runner.train()``, which builds the optimizer."""
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    if frozen:
        runner.logger.info(
            f'{len(frozen)} of {len(list(model.parameters()))} parameters are frozen '
            f'(such as {frozen[0]}): the optimizer leaves them out'
        )
        runner.logger.addFilter(_says_more)


def _says_more(record: logging.LogRecord) -> bool:
    return not record.getMessage().endswith(_EACH)
