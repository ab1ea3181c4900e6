"""Settings of dynamic detectors in yaml configs."""

import os
from pathlib import Path

import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode

from dynamicdet.errors import UsageError
from dynamicdet.routing.budget import Budget


def add_dynamicdet_config(cfg: CfgNode) -> None:
    """Add the settings of dynamic detectors to a config.

    ``MODEL.DYNAMIC`` is about the detector, see `DynamicDetector`; ``SOLVER.ROUTER`` about step 2,
    see `take_router_step`.
    """
    dynamic = cfg.MODEL.DYNAMIC = CfgNode()
    # The stock detector, a name in META_ARCH_REGISTRY.
    dynamic.META_ARCHITECTURE = 'GeneralizedRCNN'
    # Whether all exits use one pyramid and one set of heads.
    dynamic.SHARED = True
    dynamic.BACKBONES = 2
    # Leading stages that later backbones take over from the first.
    dynamic.REUSE_STAGES = 1
    # How large exit 0 sees the image; or of each exit, rising.
    dynamic.FIRST_SCALE = 1.0
    dynamic.SCALES = []
    dynamic.ROUTER = CfgNode()
    dynamic.ROUTER.REDUCTION = 4
    # Some of 'mean', 'max', 'std'.
    dynamic.ROUTER.POOLS = ['mean']
    # Whether this is step 2; `take_router_step` sets it.
    dynamic.TRAIN_ROUTER = False
    # What the router learns, see `dynamicdet.routing.Objective`.
    dynamic.OBJECTIVE = CfgNode()
    dynamic.OBJECTIVE.TYPE = 'paper'
    dynamic.OBJECTIVE.SHARE = 0.5
    dynamic.OBJECTIVE.OFFSET = None
    dynamic.OBJECTIVE.BY_CLASS = False
    # The wanted speed: at most one of these.
    dynamic.BUDGET = CfgNode()
    dynamic.BUDGET.THRESHOLD = None
    dynamic.BUDGET.HARD_SHARE = None
    dynamic.BUDGET.TARGET_LATENCY = None
    dynamic.BUDGET.TARGET_GFLOPS = None

    # 'SGD', Detectron2's own, or 'ADAMW'; step 2 always takes the latter.
    cfg.SOLVER.OPTIMIZER = 'SGD'
    cfg.SOLVER.BETAS = (0.9, 0.999)
    # Step 2 as released by the paper's authors (arXiv 2304.05552): AdamW, a constant rate after a
    # warm-up, weight decay on weights, 2 epochs of COCO's 117,266 images. They accumulate to 64
    # images; Detectron2's batches of 16 take four times the steps.
    router = cfg.SOLVER.ROUTER = CfgNode()
    router.BASE_LR = 1e-5
    router.BETAS = (0.937, 0.999)
    router.WEIGHT_DECAY = 0.005
    router.WARMUP_ITERS = 1000
    router.MAX_ITER = 14660
    router.IMS_PER_BATCH = 16
    # Images that step 1 did not see are better; empty for step 1's.
    router.TRAIN = ()
    # 'exact' passes once over the training set; 'online' goes by the last 10,000 images seen.
    router.DELTA = 'exact'

    # Pruning while step 1 trains, see `PruningHook`: a list of dicts such as
    # {'name': 'backbones', 'modules': ['backbone'], 'target': 0.3}.
    pruning = cfg.SOLVER.PRUNING = CfgNode()
    pruning.BLOCKS = []
    pruning.SCHEDULE = 'one_shot'
    pruning.START = 0
    pruning.END = None
    pruning.INTERVAL = 1

    # Removing channels for good, see `ChannelRemovalHook`: blocks as for pruning.
    removal = cfg.SOLVER.REMOVAL = CfgNode()
    removal.BLOCKS = []
    removal.START = 0
    removal.ROUND_TO = 16

    # Training for integers of 8 bits, see `QuantizationHook`.
    quantization = cfg.SOLVER.QUANTIZATION = CfgNode()
    quantization.ENABLED = False
    quantization.START = 0
    quantization.OBSERVE = None
    quantization.NOISE = 1.0
    quantization.REDUCED_RANGE = False
    # 'running' or 'learned'.
    quantization.RANGES = 'running'
    quantization.RATE = 0.001
    quantization.FLOAT_SHARE = 0.1

    # Whether a run that is resumed ends bit-equal to one that never stopped, see
    # `ExactResumeHook`; takes a SEED.
    cfg.SOLVER.EXACT_RESUME = False


def merge_config_file(cfg: CfgNode, path: str) -> None:
    """Merge a yaml file into a config that `add_dynamicdet_config` was called on.

    As ``cfg.merge_from_file``, with one more key: ``ZOO_BASE`` names a config of Detectron2's model
    zoo, of which the detector is made dynamic, such as
    ``COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml``.

    Raises:
        UsageError: If there is no such file or no such config in the zoo.
    """
    if not Path(path).is_file():
        raise UsageError(f"there is no config at '{path}'")
    content = CfgNode.load_yaml_with_base(path)
    base = content.pop('ZOO_BASE', None)
    if base is not None:
        try:
            base = model_zoo.get_config_file(base)
        except RuntimeError:
            raise UsageError(f"'{path}': Detectron2's model zoo has no config '{base}'") from None
        cfg.merge_from_file(base)
        cfg.MODEL.DYNAMIC.META_ARCHITECTURE = cfg.MODEL.META_ARCHITECTURE
        cfg.MODEL.META_ARCHITECTURE = 'DynamicDetector'
    cfg.merge_from_other_cfg(CfgNode(content))


def take_router_step(cfg: CfgNode, weights: str | None = None) -> None:
    """Turn a config of step 1 into that of step 2: its own schedule, and an own folder,
    ``OUTPUT_DIR/router``. It starts from step 1's last checkpoint in ``OUTPUT_DIR``.

    Args:
        cfg (CfgNode): Changed in place.
        weights (str, optional): Another checkpoint to start from.

    Raises:
        UsageError: If there is none.
    """
    if weights is None:
        weights = last_checkpoint(cfg.OUTPUT_DIR)
    if weights is None:
        raise UsageError(
            f"step 2 starts from step 1's result, and there is none in '{cfg.OUTPUT_DIR}': run "
            'step 1 first (the same command without --step router), or name its checkpoint by '
            'MODEL.WEIGHTS'
        )
    router = cfg.SOLVER.ROUTER
    cfg.MODEL.WEIGHTS = weights
    cfg.MODEL.DYNAMIC.TRAIN_ROUTER = True
    # Gone already: the checkpoint says which.
    cfg.SOLVER.REMOVAL.BLOCKS = []
    cfg.OUTPUT_DIR = str(Path(cfg.OUTPUT_DIR) / 'router')
    cfg.SOLVER.OPTIMIZER = 'ADAMW'
    cfg.SOLVER.BETAS = router.BETAS
    cfg.SOLVER.BASE_LR = router.BASE_LR
    cfg.SOLVER.WEIGHT_DECAY = router.WEIGHT_DECAY
    cfg.SOLVER.WEIGHT_DECAY_NORM = 0.0
    cfg.SOLVER.WEIGHT_DECAY_BIAS = 0.0
    cfg.SOLVER.LR_SCHEDULER_NAME = 'WarmupMultiStepLR'
    cfg.SOLVER.STEPS = ()
    cfg.SOLVER.WARMUP_ITERS = min(router.WARMUP_ITERS, router.MAX_ITER)
    cfg.SOLVER.MAX_ITER = router.MAX_ITER
    cfg.SOLVER.IMS_PER_BATCH = router.IMS_PER_BATCH
    if len(router.TRAIN):
        cfg.DATASETS.TRAIN = tuple(router.TRAIN)


def require_device(device: str) -> None:
    """Raise a `UsageError` if a config asks for a GPU and there is none."""
    if str(device).startswith('cuda') and not torch.cuda.is_available():
        raise UsageError(
            f"the config asks for the device '{device}', and torch sees no GPU: add MODEL.DEVICE "
            'cpu (LazyConfig: train.device=cpu)'
        )


def last_checkpoint(folder: str) -> str | None:
    """The last checkpoint of a training in a folder, as Detectron2 notes it, or None."""
    note = Path(folder) / 'last_checkpoint'
    if not note.is_file():
        return None
    path = Path(folder) / note.read_text().strip()
    return os.fspath(path) if path.is_file() else None


def set_config_budget(cfg: CfgNode, **named: float | None) -> None:
    """Write the wanted speed of a command line into a config; nothing where none is given.

    Raises:
        UsageError: If it is out of range, or several are given.
    """
    budget = Budget.parse(None, **named)
    if budget is not None:
        for name in cfg.MODEL.DYNAMIC.BUDGET:
            wanted = budget.value if name == budget.kind.upper() else None
            cfg.MODEL.DYNAMIC.BUDGET[name] = wanted
