"""A whole detector as one graph, or as two: from a picture to detections."""

import io
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from mmcv.cnn import fuse_conv_bn
from mmengine.model import ImgDataPreprocessor
from torch import Tensor, nn

from mmdet.models.detectors import DINO, BaseDetector, SingleStageDetector, TwoStageDetector
from mmdet.models.detectors.base_detr import DetectionTransformer

from ..errors import UsageError
from ..models import DynamicDetector, can_fuse
from ..models.fusing import fusible_parts
from ..models.normalization import NormalizationChange
from ..private_mmengine import normalizes, swaps_channels
from ..routing.detection_features import COUNTED, SUREST
from ..routing.merging import scale_scores
from ..routing.region_maps import is_linear
from .decoding import Candidates, Frame, build_decoder
from .graphs import (
    EXAMPLE_SIZE,
    OPSET,
    exportable_parts,
    need_for_deployment,
    quiet_export,
    require_standard,
)
from .roi_decoding import build_roi_decoder
from .standalone_parts import put_parts
from .transformer_decoding import build_transformer_decoder

#: What is taken off the sides of the example, so that it is padded, by unlike numbers of pixels.
_CUT = (5, 9)
#: Inputs of every graph that uses them; `standalone_runtime` has them by these names.
IMAGE, SCALE, ORIGINAL = 'image', 'scale', 'original'
#: Outputs of every graph; of the first of two there are a difficulty and maps, too.
DETECTIONS = ('boxes', 'scores', 'labels')
DIFFICULTY, MAP, MASKS = 'difficulty', 'map', 'masks'
#: Input of a graph of both halves.
THRESHOLD = 'threshold'


class Prepared(nn.Module):
    """What a data preprocessor makes of one picture, and what of it is padding.

    Args:
        preprocessor (nn.Module): Of the detector.
        change (nn.Module, optional): What a later detector of a pair has to change. Defaults to
            nothing.

    Raises:
        UsageError: If it is none that pads and normalizes pictures.
    """

    def __init__(self, preprocessor: nn.Module, change: NormalizationChange | None = None) -> None:
        super().__init__()
        if not isinstance(preprocessor, ImgDataPreprocessor):
            raise UsageError(
                f'a {type(preprocessor).__name__} cannot be exported with --standalone: the '
                'detector needs a DetDataPreprocessor'
            )
        self.divisor = preprocessor.pad_size_divisor
        self.swaps, self.pad_value = swaps_channels(preprocessor), float(preprocessor.pad_value)
        if normalizes(preprocessor):
            self.register_buffer('mean', preprocessor.mean.clone())
            self.register_buffer('std', preprocessor.std.clone())
        else:
            self.mean = self.std = None
        self.change = change if change is not None and change.changes else None

    def forward(self, image: Tensor) -> Tensor:
        """A picture, (1, 3, h, w), uint8, as the network sees it, (1, 3, H, W), float32: H and W
        are h and w, rounded up to the divisor."""
        pixels = image.float()
        pixels = pixels.flip(1) if self.swaps else pixels
        if self.mean is not None:
            pixels = (pixels - self.mean) / self.std
        pad_value = self.pad_value
        if self.change is not None:
            pixels, pad_value = self.change(pixels), self.change.padding
        height, width = pixels.shape[-2:]
        below, right = (
            (side + self.divisor - 1) // self.divisor * self.divisor - side
            for side in (height, width)
        )
        return F.pad(pixels, (0, right, 0, below), value=pad_value)


class Reduced(nn.Module):
    """`cascade.resolution.reduce_images` in a graph, by products of matrices: opset 17 has no
    resizing that averages what it makes smaller, and not all that know later ones compute it.

    Args:
        scale (float): In (0, 1]; about this share of the sides is left.
        stride (int): Sides are multiples of it.
        longest (int, optional): The most pixels of a side. Defaults to any number.
    """

    def __init__(self, scale: float, stride: int, longest: int | None = None) -> None:
        super().__init__()
        self.scale, self.stride, self.longest = scale, stride, longest

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images, (1, 3, H, W), resized, and the factors of width and height, (2,)."""
        old = torch.stack([torch.as_tensor(side) for side in images.shape[-2:]]).float()
        scale = old.new_tensor(self.scale)
        if self.longest is not None:
            scale = torch.minimum(scale, self.longest / old.max())
        new = (old * scale / self.stride).round().clamp(min=1) * self.stride
        rows = _resized_rows(images[0], old[0], new[0], self.stride)
        columns = _resized_rows(rows.transpose(1, 2), old[1], new[1], self.stride)
        return columns.transpose(1, 2)[None], (new / old).flip(0)


def _resized_rows(image: Tensor, old: Tensor, new: Tensor, block: int) -> Tensor:
    """An image, (3, old, W), with another number of rows, (3, new, W), bilinear with antialiasing.

    A block of new rows needs the old rows of a window alone: one matrix for each block has far
    fewer weights than one for all.
    """
    step = old / new
    reach = step.clamp(min=1)
    width = (block * step + 2 * reach).ceil().long() + 1
    starts = (torch.arange((new / block).long()) * block * step - reach).floor()
    rows = starts[:, None] + torch.arange(width)
    middles = ((torch.arange(new.long()) + 0.5) * step).reshape(-1, block, 1)
    weights = (1 - ((rows[:, None] + 0.5 - middles) / reach).abs()).clamp(min=0)
    weights = weights * ((rows >= 0) & (rows < old)).float()[:, None]
    weights = weights / weights.sum(dim=2, keepdim=True)
    inside = torch.minimum(rows.clamp(min=0), old - 1).long().flatten()
    windows = image.index_select(1, inside).reshape(3, -1, width, image.shape[-1])
    return (weights @ windows).reshape(3, -1, image.shape[-1])


class Exit(nn.Module):
    """Neck, heads, decoding and NMS of an exit.

    Args:
        branch (nn.Module): Has the neck and the heads.
        scaling (tuple[float, float]): Of the logit of its scores, see
            `routing.merging.scale_scores`. Defaults to (1, 0), scores as they are.
        masks (bool): Whether it gives masks, too. Defaults to False.
    """

    def __init__(
        self, branch: nn.Module, scaling: tuple[float, float] = (1.0, 0.0), masks: bool = False
    ) -> None:
        super().__init__()
        _require_stock(branch)
        self.neck = branch.neck if getattr(branch, 'neck', None) is not None else nn.Identity()
        self.scaling = scaling
        #: Names of what it gives.
        self.outputs = (*DETECTIONS, MASKS) if masks else DETECTIONS
        if isinstance(branch, DetectionTransformer):
            self.heads = nn.ModuleList([branch])
            self._detect = build_transformer_decoder(branch)
        elif getattr(branch, 'roi_head', None) is not None:
            self.heads = nn.ModuleList([branch.rpn_head, branch.roi_head])
            self._detect = build_roi_decoder(branch, masks)
        else:
            self.heads = nn.ModuleList([branch.bbox_head])
            decode = build_decoder(branch.bbox_head)
            self._detect = lambda maps, frame: decode(branch.bbox_head(maps), frame)

    def forward(self, maps: Sequence[Tensor], frame: Frame) -> tuple[Tensor, ...]:
        """Boxes, (D, 4), scores, (D,), labels, (D,), and perhaps masks of boxes, (D, h, w), in
        [0, 1], of maps, (1, C_i, H_i, W_i)."""
        found: Candidates = self._detect(self.neck(maps), frame)
        scores = scale_scores(found.scores, *self.scaling)
        masks = () if found.masks is None else (found.masks,)
        return found.boxes, scores, found.labels, *masks


def has_masks(model: BaseDetector) -> bool:
    """Whether all exits give masks."""
    branches = model.branches if isinstance(model, DynamicDetector) else [model]
    return all(
        getattr(getattr(branch, 'roi_head', None), 'with_mask', False) for branch in branches
    )


def _require_stock(branch: nn.Module) -> None:
    stock = (SingleStageDetector, TwoStageDetector, DINO)
    if not any(
        type(branch).predict is kind.predict and type(branch).extract_feat is kind.extract_feat
        for kind in stock
    ):
        raise UsageError(
            f'{type(branch).__name__} cannot be exported with --standalone: only single- and '
            'two-stage detectors of MMDetection and DINO can; export it without --standalone'
        )


def _require_unpadded(branch: nn.Module, prepared: Prepared) -> None:
    if isinstance(branch, DetectionTransformer) and prepared.divisor > 1:
        raise UsageError(
            f'{type(branch).__name__} with pad_size_divisor={prepared.divisor} cannot be exported '
            'with --standalone: set data_preprocessor.pad_size_divisor=1 by --cfg-options'
        )


def _frame(image: Tensor, scale: Tensor, original: Tensor, ratio: Tensor | None) -> Frame:
    """Of a picture, (1, 3, h, w), as an exit sees it that sees it smaller by a ratio."""
    height, width = (torch.as_tensor(side).float() for side in image.shape[-2:])
    if ratio is None:
        return Frame(height, width, scale, original)
    return Frame((height * ratio[1]).round(), (width * ratio[0]).round(), scale * ratio, original)


def _as_float(image: Tensor) -> Tensor:
    # The first of all: some that compute graphs let nothing else read uint8.
    return image.float()


class PlainDetector(nn.Module):
    """A plain detector from a picture to detections.

    Args:
        model (BaseDetector): In eval mode.
    """

    def __init__(self, model: BaseDetector) -> None:
        super().__init__()
        self.prepared = Prepared(model.data_preprocessor)
        self.backbone, self.exit = model.backbone, Exit(model, masks=has_masks(model))
        _require_unpadded(model, self.prepared)
        #: Names of what it gives.
        self.outputs = self.exit.outputs

    def forward(self, image: Tensor, scale: Tensor, original: Tensor) -> tuple[Tensor, ...]:
        """Detections of a picture.

        Args:
            image (Tensor): (1, 3, h, w), uint8, BGR, as the test pipeline delivers it.
            scale (Tensor): Factors of width and height by which the pipeline resized it, (2,).
            original (Tensor): Height and width before that, (2,).

        Returns:
            tuple[Tensor]: Boxes, (D, 4), in the original frame, scores, (D,), labels, (D,), int64;
            of detectors with masks those of each box, (D, h, w), in [0, 1].
        """
        image = _as_float(image)
        frame = _frame(image, scale, original, None)
        return self.exit(tuple(self.backbone(self.prepared(image))), frame)


class _Half(nn.Module):
    """What both halves of a dynamic detector share: how an exit sees a picture."""

    def __init__(self, model: DynamicDetector, exit: int) -> None:
        super().__init__()
        change = model.normalizations[exit - 1] if exit and len(model.normalizations) else None
        self.prepared = Prepared(model.data_preprocessor, change)
        scale, longest = model.scales[exit], None if exit else model.first_size
        reduces = scale < 1 or longest is not None
        self.reduced = Reduced(scale, model.stride, longest) if reduces else None
        self.exit = Exit(model.branch(exit), model._scaling[exit], has_masks(model))
        _require_unpadded(model.branch(exit), self.prepared)

    def view(self, image: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """What the backbone sees of a picture, by which ratio that is smaller, and the prepared
        picture before that."""
        prepared = self.prepared(image)
        if self.reduced is None:
            return prepared, None, prepared
        return *self.reduced(prepared), prepared


class FirstHalf(_Half):
    """A dynamic detector up to its first exit. Its maps are outputs, too: all, or those that
    ``keeps`` names.

    Args:
        model (DynamicDetector): In eval mode.
        keeps (Sequence[int]): Indices of maps. Defaults to none.
    """

    def __init__(self, model: DynamicDetector, keeps: Sequence[int] = ()) -> None:
        super().__init__(model, 0)
        self.net, self.router = model.backbone.first, model.router
        self._first_maps, self._select = model.backbone.first_maps, model.backbone.select
        self.keeps = tuple(keeps)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Their names."""
        return (*self.exit.outputs, DIFFICULTY, *(f'{MAP}{index}' for index in self.keeps))

    def forward(self, image: Tensor, scale: Tensor, original: Tensor) -> tuple[Tensor, ...]:
        """As `PlainDetector`'s; then the difficulty, (1,), and maps, (1, C_i, H_i, W_i)."""
        image = _as_float(image)
        seen, ratio, prepared = self.view(image)
        maps = self._first_maps(seen)
        found = self.exit(self._select(maps), _frame(image, scale, original, ratio))
        seen_maps = [_without_padding(m, image, prepared) for m in maps]
        more = {}
        if self.router.sees_detections:
            more = dict(detections=_detection_features(found, self.router.class_weights))
        difficulty = self.router(seen_maps, **more)
        return *found, difficulty, *(maps[index] for index in self.keeps)

    def _detected(self, image: Tensor, scale: Tensor, original: Tensor) -> tuple:
        """Detections, maps, and the picture as numbers and prepared."""
        image = _as_float(image)
        seen, ratio, prepared = self.view(image)
        maps = self._first_maps(seen)
        found = self.exit(self._select(maps), _frame(image, scale, original, ratio))
        return found, maps, image, prepared

    def maps(self, image: Tensor) -> tuple[Tensor, ...]:
        """All maps of a picture."""
        return self._first_maps(self.view(image)[0])


class RegionsFirstHalf(FirstHalf):
    """The same without a difficulty: `standalone_regions` computes it of the detections."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(name for name in super().outputs if name != DIFFICULTY)

    def forward(self, image: Tensor, scale: Tensor, original: Tensor) -> tuple[Tensor, ...]:
        """As `FirstHalf`'s."""
        found, maps, *_ = self._detected(image, scale, original)
        return *found, *(maps[index] for index in self.keeps)


def _detection_features(found: Sequence[Tensor], class_weights: Tensor) -> Tensor:
    """`routing.detection_features.features` of one image, (1, w)."""
    boxes, scores, labels = found[:3]
    none = scores.new_zeros(SUREST)
    best, rows = torch.cat([scores, none]).topk(SUREST)
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0)
    sizes = torch.cat([(sides[:, 0] * sides[:, 1]).sqrt(), none])[rows]
    unsure, weights = scores * (1 - scores), class_weights[labels]
    sums = [(scores > floor).float().sum() for floor in COUNTED]
    sums += [unsure.sum(), (scores * weights).sum(), (unsure * weights).sum()]
    return torch.cat([best, sizes, torch.stack(sums)])[None]


def _without_padding(values: Tensor, image: Tensor, prepared: Tensor) -> Tensor:
    """The cells of a map that see a picture, and not only what it is padded with, as the router
    looks at them."""
    height, width = (
        # Of what is positive: ONNX rounds towards 0.
        (size * cells + whole - 1) // whole
        for size, cells, whole in zip(
            image.shape[-2:], values.shape[-2:], prepared.shape[-2:], strict=True
        )
    )
    return values[:, :, :height, :width]


class SecondHalf(_Half):
    """A dynamic detector from its first exit to its second.

    Args:
        model (DynamicDetector): In eval mode.
    """

    def __init__(self, model: DynamicDetector) -> None:
        super().__init__(model, 1)
        #: Names of what it gives.
        self.outputs = self.exit.outputs
        backbone = model.backbone
        self.nets = nn.ModuleList([backbone.nets[-1], backbone.connections])
        self._select = backbone.select
        # One backbone sees the picture again, in another size.
        self._deeper_maps: Callable[..., tuple] = (
            backbone.deeper_maps
            if len(backbone.names) > 1
            else lambda images, maps: backbone.first_maps(images)
        )

    def forward(
        self, image: Tensor, scale: Tensor, original: Tensor, *maps: Tensor
    ) -> tuple[Tensor, ...]:
        """As `PlainDetector`'s, of the picture and the first half's maps, all of them."""
        image = _as_float(image)
        seen, ratio, _ = self.view(image)
        found = self._select(tuple(self._deeper_maps(seen, maps)))
        return self.exit(found, _frame(image, scale, original, ratio))


def build_halves(model: BaseDetector, fuse: bool = True) -> dict[str, nn.Module]:
    """What becomes graphs: 'detector' of a plain one, 'first' and 'second' of a dynamic one.

    Args:
        model (BaseDetector): On the CPU. It is of no other use afterwards.
        fuse (bool): Whether a model's own parts are fused before. Defaults to True.

    Raises:
        UsageError: If it is of a kind that cannot be exported so.
    """
    require_standalone(model)
    model.eval()
    # As `models.fuse`, but for what is made for torch on a CPU alone.
    whole = getattr(model, 'whole_detectors', [[model]]) if fuse else []
    for part in chain(*filter(_has_fusible, whole)):
        fuse_conv_bn(part)
        for module in fusible_parts(part):
            module.fuse()
    if not isinstance(model, DynamicDetector):
        return dict(detector=PlainDetector(model))
    first = FirstHalf if model.regions is None else RegionsFirstHalf
    return dict(first=first(model), second=SecondHalf(model))


def _has_fusible(detector: Sequence[nn.Module]) -> bool:
    return any(map(can_fuse, detector))


def require_standalone(model: BaseDetector) -> None:
    """Raise a `UsageError` for a detector that has no standalone form."""
    exportable_parts(model)
    if not isinstance(model, DynamicDetector):
        return
    for holds, what, remedy in (
        (model.num_exits != 2, f'{model.num_exits} exits', 'take a config of two'),
        (
            model.merge is not None and model.regions is None,
            'merged exits without regions',
            'set model.merge=None by --cfg-options',
        ),
        (
            model.regions is not None and has_masks(model),
            'regions of a detector with masks',
            'take a config without regions',
        ),
        (
            model.regions is not None and not is_linear(model.regions.router),
            'a router of regions that sees maps or has hidden channels',
            'take one without them',
        ),
    ):
        if holds:
            raise UsageError(f'--standalone does not support {what}: {remedy}')


@torch.no_grad()
def export_halves(
    halves: dict[str, nn.Module], parts: Mapping[str, bytes] | None = None
) -> dict[str, bytes]:
    """ONNX files of what `build_halves` made, by name. Height and width of pictures are free; each
    graph is of one picture.

    The first half gives those maps alone that the second looks at.

    Args:
        halves (dict): Of `build_halves`.
        parts (Mapping[str, bytes], optional): Graphs of parts, by name, for which others stood in;
            see `standalone_parts.stand_in`. Defaults to none.

    Raises:
        UsageError: If an operator cannot be in a graph.
    """
    # Where nothing is padded, only the example's own sides suit the strides.
    divisor = next(iter(halves.values())).prepared.divisor
    height, width = (side - cut * (divisor > cut) for side, cut in zip(EXAMPLE_SIZE, _CUT))
    image = torch.randint(
        0, 256, (1, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    inputs = (image, torch.tensor([0.5, 0.75]), torch.tensor([height / 0.75, width / 0.5]))
    if 'detector' in halves:
        return dict(detector=_export('detector', halves['detector'], inputs, parts))
    first, second = halves['first'], halves['second']
    content = _export('second', second, (*inputs, *first.maps(image)), parts)
    graph = need_for_deployment('onnx').load_from_string(content).graph
    first.keeps = tuple(
        int(entry.name.removeprefix(MAP)) for entry in graph.input if entry.name.startswith(MAP)
    )
    return dict(first=_export('first', first, inputs, parts), second=content)


def join_halves(first: bytes, second: bytes) -> bytes:
    """Both halves as one ONNX file, whose further input is a threshold, float32, a scalar: an image
    that is no more difficult has what the first half finds, another one runs the second, which
    stands in an ``If``."""
    onnx = need_for_deployment('onnx')
    make = onnx.helper
    model, other = (onnx.load_from_string(content) for content in (first, second))
    graph, deeper = model.graph, other.graph
    # Images, and maps of the first half, are read from outside of the branch.
    outer = {entry.name for entry in deeper.input}
    for node in deeper.node:
        node.name = f'second/{node.name}'
        for side in (node.input, node.output):
            side[:] = [name if name in outer or not name else f'second/{name}' for name in side]
    for weight in deeper.initializer:
        weight.name = f'second/{weight.name}'
    found = [entry for entry in graph.output if entry.name in (*DETECTIONS, MASKS)]
    names = [entry.name for entry in found]
    for node in graph.node:
        for side in (node.input, node.output):
            side[:] = [f'first/{name}' if name in names else name for name in side]
    copies = [make.make_node('Identity', [f'first/{name}'], [f'easy/{name}']) for name in names]
    hard, easy = (
        make.make_graph(nodes, what, [], [_named(entry, f'{what}/{entry.name}') for entry in found])
        for what, nodes in (('second', deeper.node), ('easy', copies))
    )
    graph.initializer.extend(deeper.initializer)
    graph.input.append(make.make_tensor_value_info(THRESHOLD, onnx.TensorProto.FLOAT, []))
    graph.node.append(make.make_node('Greater', [DIFFICULTY, THRESHOLD], ['hard'], 'hard'))
    graph.node.append(
        make.make_node('If', ['hard'], names, 'exit', then_branch=hard, else_branch=easy)
    )
    del graph.output[len(names) + 1 :]
    del graph.value_info[:]
    return model.SerializeToString()


def _named(entry: Any, name: str) -> Any:
    copy = type(entry)()
    copy.CopyFrom(entry)
    copy.name = name
    return copy


def _export(
    name: str, module: nn.Module, inputs: Sequence[Tensor], parts: Mapping[str, bytes] | None = None
) -> bytes:
    names = [IMAGE, SCALE, ORIGINAL, *(f'{MAP}{index}' for index in range(len(inputs) - 3))]
    axes = {name: {2: f'{name}_height', 3: f'{name}_width'} for name in (IMAGE, *names[3:])}
    axes.update({output: {0: 'detections'} for output in (*DETECTIONS, MASKS)})
    axes.update(
        {
            output: {2: f'{output}_height', 3: f'{output}_width'}
            for output in module.outputs
            if output.startswith(MAP)
        }
    )
    file = io.BytesIO()
    try:
        with quiet_export():
            torch.onnx.export(
                module.eval(),
                tuple(inputs),
                file,
                input_names=names,
                output_names=list(module.outputs),
                dynamic_axes=axes,
                opset_version=OPSET,
                dynamo=False,
            )
    except UsageError:
        raise
    except Exception as error:
        # Operators of others fail in their own ways.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UsageError(f"the graph '{name}' cannot be exported: {reason}") from error
    content = file.getvalue() if parts is None else put_parts(file.getvalue(), parts)
    require_standard(content, name)
    return content
