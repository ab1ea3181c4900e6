"""Records of real pictures for experiments/real.md: one published YOLOX-nano as two exits, at 320 and 640 pixels.

python experiments/real_records.py DATA OUT [--more FOLDER]

OUT gets ``router.npz`` and ``test.npz``, their annotation files, the config and the checkpoint. Nothing is
trained. With --more, a folder of further pictures of COCO val2017, those of them that ``*_more.json`` know
count too. What is there already is not made again.
"""

import argparse
import json
from pathlib import Path

from mmengine.config import Config
from steps import run

from dynamicdet import cli
from dynamicdet.building import load_detector
from dynamicdet.checkpoints import write_checkpoint
from dynamicdet.errors import UsageError
from dynamicdet.files import write_atomically

SPLITS = ('router', 'test')
#: Sides of the squares that the exits see.
SMALL, LARGE = 320, 640
_STOCK = 'yolox/yolox_nano_8xb8-300e_coco.py'
_WEIGHTS = 'weights/yolox_nano_mmdet.pth'


def join_annotations(data: Path, split: str, more: Path | None) -> dict:
    """The annotations of a split: of the pictures in the folder and of those of ``more`` that are at
    hand. File names become absolute paths, since they lie in two folders."""
    joined: dict = {}
    folders = {split: data / 'coco' / 'val2017', **({f'{split}_more': more} if more else {})}
    for name, folder in folders.items():
        content = json.loads((data / 'coco' / 'annotations' / f'{name}.json').read_text())
        images = [
            dict(image, file_name=str((folder / image['file_name']).resolve()))
            for image in content['images']
            if (folder / image['file_name']).is_file()
        ]
        known = {image['id'] for image in images}
        joined.setdefault('categories', content['categories'])
        joined.setdefault('images', []).extend(images)
        joined.setdefault('annotations', []).extend(
            annotation for annotation in content['annotations'] if annotation['image_id'] in known
        )
    # Ids of two files may be the same.
    joined['annotations'] = [
        dict(annotation, id=index) for index, annotation in enumerate(joined['annotations'], 1)
    ]
    return joined


def stock_config(ann_file: Path, side: int) -> Config:
    """The stock detector's config, its test data these annotations at a size."""
    cfg = cli.read_config(f'mmdet::{_STOCK}')
    # Only training has them, and they need a Runner.
    cfg.model.data_preprocessor.batch_augments = None
    for split in ('val', 'test'):
        loader = cfg[f'{split}_dataloader']
        loader.update(batch_size=1, num_workers=0, persistent_workers=False)
        loader.dataset.update(
            data_root='', ann_file=str(ann_file.resolve()), data_prefix=dict(img='')
        )
        for step in loader.dataset.pipeline:
            if step.type == 'Resize':
                step.scale = (side, side)
        cfg[f'{split}_evaluator'].ann_file = str(ann_file.resolve())
    return cfg


def dynamic_config(ann_file: Path) -> Config:
    """One backbone, neck and head at two sizes, and a router that sees three pools of the maps."""
    cfg = stock_config(ann_file, LARGE)
    cfg.custom_imports = dict(imports=['dynamicdet'], allow_failed_imports=False)
    cfg.model = dict(
        type='DynamicDetector',
        detector=cfg.model.to_dict(),
        backbone=cfg.model.backbone.to_dict(),
        backbones=1,
        shared=True,
        reuse_stages=0,
        first_scale=SMALL / LARGE,
        router=dict(type='Router', pools=('mean', 'max', 'std')),
    )
    return cfg


def make_records(data: Path, out: Path, more: Path | None, splits=SPLITS) -> None:
    """All that the analyses need."""
    out.mkdir(parents=True, exist_ok=True)
    for split in splits:
        ann_file, config = out / f'{split}.json', out / f'coco_{split}.py'
        if not ann_file.exists():
            write_atomically(json.dumps(join_annotations(data, split, more)).encode(), ann_file)
        cfg = dynamic_config(ann_file)
        cfg.dump(config)
        if not (out / 'dynamic.pth').exists():
            model, _ = load_detector(cfg, str(data / _WEIGHTS), plain=True)
            write_checkpoint(dict(state_dict=model.state_dict(), meta={}), out / 'dynamic.pth')
        if not (out / f'{split}.npz').exists():
            run(
                'tools/record.py',
                str(config.resolve()),
                str((out / 'dynamic.pth').resolve()),
                f'--out={(out / f"{split}.npz").resolve()}',
                '--view=none',
                '--no-data-check',
                '--device=cpu',
                log=out / f'{split}.log',
            )
            print(f'{split}: {out / f"{split}.npz"}', flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('data', type=Path, help='folder with coco/ and weights/')
    parser.add_argument('out', type=Path, help='where records go')
    parser.add_argument('--more', type=Path, help='folder with more pictures of COCO val2017')
    parser.add_argument('--splits', nargs='+', choices=SPLITS, default=SPLITS)
    args = parser.parse_args()
    cli.prepare()
    if not (args.data / _WEIGHTS).is_file():
        raise UsageError(f"there are no weights at '{args.data / _WEIGHTS}'")
    make_records(args.data, args.out, args.more, args.splits)


if __name__ == '__main__':
    cli.run(main)
