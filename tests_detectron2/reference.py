"""What the MMDetection side makes of a dynamic detector whose weights follow from their names.

    PYTHONPATH=projects:tests/test_interop .venv/bin/python tests_detectron2/reference.py

in the environment of `make setup` writes data/dynamic_faster_rcnn.json, which test_parity.py
compares with. Weights: those of tests/data/detectron2_faster_rcnn_r_50_fpn_3x.json at both exits,
with a fifth of their objectness, lest it is 1 in float32 for many proposals (mmdet ranks them by
it, Detectron2 by its logit); connections and router by `fill`, the norms of the former times 0.2,
the router's last weight times 0.3.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / 'tests/data/detectron2_faster_rcnn_r_50_fpn_3x.json'
TARGET = Path(__file__).parent / 'data/dynamic_faster_rcnn.json'
#: Of each map, every so manyeth number is kept.
EVERY = 1009

_spec = importlib.util.spec_from_file_location('weights', ROOT / 'tests/data/reference_weights.py')
weights = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(weights)


def plain_state() -> dict:
    """The plain detector's entries, under Detectron2's names."""
    state = weights.checkpoint(SOURCE, 'detectron2')
    state['proposal_generator.rpn_head.objectness_logits.weight'] *= np.float32(0.2)
    return state


def own_state(shapes: dict) -> dict:
    """Entries of connections and router: they have the same names on both sides.

    Args:
        shapes (dict): Name -> shape, of the whole dynamic detector.
    """
    state = {}
    for key, shape in shapes.items():
        if key.startswith(('backbone.connections.', 'router.')):
            factor = 0.2 if key.endswith('.1.weight') else 0.3 if key == 'router.fc2.weight' else 1
            state[key] = weights.fill(key, shape) * np.float32(factor)
            if key in ('router.mean', 'router.std'):
                state[key] = np.full(shape, float(key.endswith('std')), np.float32)
    return state


def image() -> np.ndarray:
    """BGR, (3, 256, 320), 0 to 255."""
    return weights.inputs(json.loads(SOURCE.read_text())['input'])


def main() -> None:
    """Run the MMDetection side, and write."""
    import torch
    from foreign import build

    from dynamicdet.exchange.rules import apply_rules
    from dynamicdet.interop.detectron2 import DETECTRON2
    from mmdet.structures import DetDataSample

    model = build('dy_faster_rcnn_detectron2').eval()
    plain = {key: torch.from_numpy(value) for key, value in plain_state().items()}
    state = model.spread_plain_weights(apply_rules(DETECTRON2.rules(model), plain)[0])
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    state |= {key: torch.from_numpy(np.asarray(v)) for key, v in own_state(shapes).items()}
    model.load_state_dict({**model.state_dict(), **state})
    pixels = torch.from_numpy(image())
    size = tuple(pixels.shape[1:])
    facts = dict(img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0), pad_shape=size)
    content: dict = dict(exits=[])
    with torch.no_grad():
        for threshold in (1, -1):
            model.set_budget(threshold=threshold)
            sample = DetDataSample(metainfo=dict(facts))
            (result,) = model.test_step(dict(inputs=[pixels], data_samples=[sample]))
            detections = result.pred_instances
            content['difficulty'] = result.difficulty
            content['exits'].append(
                dict(
                    boxes=[[round(side, 3) for side in box] for box in detections.bboxes.tolist()],
                    scores=[round(score, 6) for score in detections.scores.tolist()],
                    labels=detections.labels.tolist(),
                )
            )
        sample = DetDataSample(metainfo=dict(facts))
        data = model.data_preprocessor(dict(inputs=[pixels], data_samples=[sample]), False)
        first = model.backbone.first_maps(data['inputs'])
        second = model.backbone.deeper_maps(data['inputs'], first)
    content['maps'] = [
        [[round(value, 6) for value in m.flatten()[::EVERY].tolist()] for m in maps]
        for maps in (first, second)
    ]
    TARGET.write_text(json.dumps(content))


if __name__ == '__main__':
    main()
