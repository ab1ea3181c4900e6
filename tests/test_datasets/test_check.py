import json

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config

from dynamicdet.datasets.check import check_coco, check_dataloaders
from dynamicdet.errors import UsageError
from mmdet.datasets import CocoDataset

CLASSES = ('cat', 'dog')
BOXES = dict(
    zero=[10, 10, 0, 5],
    negative=[10, 10, -4, 5],
    outside=[60, 10, 10, 10],
    tiny=[10, 10, 0.5, 5],
    partly=[40, 40, 20, 20],
)


def picture(seed):
    noise = np.random.default_rng(seed).integers(0, 256, (48, 48, 3), np.uint8)
    return cv2.GaussianBlur(noise, (0, 0), 2)


def coco(count=4):
    """A sound annotation file of images of 48 x 48, with one box each."""
    return dict(
        images=[dict(id=i, file_name=f'{i}.jpg', width=48, height=48) for i in range(count)],
        annotations=[annotation(i + 1, i) for i in range(count)],
        categories=[dict(id=5, name='cat'), dict(id=7, name='dog')],
    )


def annotation(key, image, box=(8, 8, 20, 20), category=5, **more):
    return dict(
        id=key,
        image_id=image,
        bbox=list(box),
        area=max(box[2] * box[3], 1),
        category_id=category,
        iscrowd=0,
        **more,
    )


class Data:
    """A data set on disk, and what the check says of it."""

    def __init__(self, root, data=None, split='train'):
        self.ann, self.images = root / f'{split}.json', root / split
        self.images.mkdir(parents=True)
        data = coco() if data is None else data
        for image in data['images']:
            cv2.imwrite(str(self.images / image['file_name']), picture(image['id']))
        self.write(data)

    def write(self, data):
        self.ann.write_text(data if isinstance(data, str) else json.dumps(data))

    def lines(self, classes=CLASSES, **kwargs):
        return check_coco(str(self.ann), str(self.images), classes, **kwargs)

    def refusal(self, classes=CLASSES):
        with pytest.raises(UsageError) as caught:
            self.lines(classes)
        message = str(caught.value)
        assert '\n' not in message and str(self.ann) in message
        return message


@pytest.fixture
def data(tmp_path):
    return Data(tmp_path)


def kept(data, classes=CLASSES, **kwargs):
    """How many annotations mmdet's own data set keeps."""
    dataset = CocoDataset(
        ann_file=str(data.ann),
        data_prefix=dict(img=str(data.images)),
        pipeline=[],
        metainfo=dict(classes=classes),
        **kwargs,
    )
    return sum(len(dataset.get_data_info(i)['instances']) for i in range(len(dataset)))


def test_a_sound_data_set_gives_no_lines(data):
    seen = []
    assert data.lines(progress=lambda *counts: seen.append(counts)) == []
    assert data.lines(classes=None) == []
    assert seen == [(4, 4)]


@pytest.mark.parametrize(
    'text, said',
    [
        ('', 'is not JSON'),
        ('{"images": [{"id": 1, "file', 'cut short'),
        ('[1, 2]', "no list of 'images'"),
        ('{"annotations": []}', "no list of 'images'"),
        ('{"images": 3}', "no list of 'images'"),
        ('{"images": []}', 'there are no images'),
    ],
)
def test_files_that_are_no_annotations(data, text, said):
    data.write(text)
    assert said in data.refusal()


def test_a_binary_annotation_file(data):
    data.ann.write_bytes(b'\xff\xfe\x80' * 1000)
    message = data.refusal()
    assert 'is not JSON' in message and len(message) < 400


def broken(**changes):
    """Change a sound file: ``images_0_id=...`` sets that value, None removes it."""
    data = coco()
    for path, value in changes.items():
        group, index, key = path.split('_', 2)
        entry = data[group][int(index)]
        entry.update({key: value}) if value is not None else entry.pop(key)
    return data


@pytest.mark.parametrize(
    'changes, said',
    [
        (dict(images_1_id=0), '1 id(s) belong to several images (such as 0)'),
        (dict(images_2_file_name=None), "image number 2 {'id': 2} has no 'file_name'"),
        (dict(images_2_width=None), "has no 'width'"),
        (dict(images_2_height=0), "image '2.jpg' has no width or height above 0"),
        (
            dict(images_2_width=3000, images_2_height=8),
            '1 image(s) are more than 100 times as long as wide (2.jpg)',
        ),
        (
            dict(images_2_height='tall'),
            "image number 2 {'id': 2, 'file_name': '2.jpg'} has height 'tall', where a whole",
        ),
        (
            dict(annotations_3_bbox=None),
            "annotation number 3 {'id': 4, 'image_id': 3} has no 'bbox'",
        ),
        (
            dict(annotations_3_bbox=[1, 2, 3]),
            "{'id': 4, 'image_id': 3} has bbox [1, 2, 3], where a list of 4",
        ),
        (dict(annotations_3_bbox=[1, 2, 3, float('nan')]), 'has bbox [1, 2, 3, nan]'),
        (dict(categories_1_name='cat'), '1 name(s) belong to several categories (such as cat)'),
        (dict(categories_1_id=5), '1 id(s) belong to several categories'),
    ],
)
def test_annotations_that_mmdet_stumbles_over(data, changes, said):
    data.write(broken(**changes))
    assert said in data.refusal()


def test_mmdet_asserts_unique_annotation_ids(data):
    """Why they are numbered anew."""
    data.write(broken(annotations_1_id=1))
    with pytest.raises(AssertionError, match='not unique'):
        kept(data)


def test_classes_that_do_not_fit(data):
    assert 'none of the classes of the config (bird) is among' in data.refusal(('bird',))
    assert "must be a list of names, not 'cat'" in data.refusal('cat')
    data.write({**coco(), 'categories': []})
    assert "no 'categories'" in data.refusal()
    data.write(coco())
    said = data.refusal(('bird', 'cat', 'dog'))
    assert '1 of the 3 classes of the config are not among' in said and '(bird)' in said
    said = data.refusal(('dog', 'cat'))
    assert 'another order' in said and 'with cat, dog' in said


def test_labels_follow_the_file(data):
    """Why order and absent classes matter: mmdet's own label of a cat is 0."""
    for classes in (('dog', 'cat'), ('bird', 'cat', 'dog')):
        dataset = CocoDataset(
            ann_file=str(data.ann),
            data_prefix=dict(img=''),
            pipeline=[],
            metainfo=dict(classes=classes),
        )
        assert dataset.get_data_info(0)['instances'][0]['bbox_label'] == 0


@pytest.mark.parametrize(
    'extra, said, dropped',
    [
        (annotation(9, 2, BOXES['zero']), '1 box(es) of zero or negative size', 1),
        (annotation(9, 2, BOXES['negative']), '1 box(es) of zero or negative size', 1),
        (annotation(9, 2, BOXES['outside']), '1 box(es) wholly outside', 1),
        (annotation(9, 2, BOXES['tiny']), '1 box(es) less than a pixel', 1),
        (annotation(9, 2, BOXES['partly']), '1 box(es) partly outside', 0),
        ({**annotation(9, 2), 'area': 0}, "1 annotation(s) with an 'area' of zero", 1),
        (annotation(9, 2, ignore=1), "1 annotation(s) marked 'ignore'", 1),
        (annotation(9, 2, category=99), 'a category_id that is not in the file', 1),
    ],
)
def test_odd_annotations(data, extra, said, dropped):
    """What is said to be unused is what mmdet leaves out."""
    odd = coco()
    odd['annotations'].append(extra)
    data.write(odd)
    (line,) = data.lines()
    assert said in line and "(first: '2.jpg', annotation 9)" in line
    assert kept(data) == 5 - dropped


def test_rounding_is_not_worth_a_line(data):
    odd = coco()
    odd['annotations'].append(annotation(9, 2, (-0.1, 0, 48.3, 48)))
    data.write(odd)
    assert data.lines() == []


def test_annotations_of_unknown_images(data):
    odd = coco()
    odd['annotations'] += [annotation(8, 77), annotation(9, 78, BOXES['zero'])]
    data.write(odd)
    (line,) = data.lines()
    assert '2 annotation(s) of images that the file does not list' in line
    assert '(first: image_id 77, annotation 8)' in line
    assert kept(data) == 4


def test_categories_that_the_config_does_not_have(data):
    odd = coco()
    odd['annotations'].append(annotation(9, 2, category=7))
    data.write(odd)
    (line,) = data.lines(('cat',))
    assert '1 annotation(s) of 1 categories' in line and '(dog)' in line and 'not used' in line
    assert kept(data, ('cat',)) == 4


def test_images_without_annotations(data):
    odd = coco()
    odd['annotations'] = odd['annotations'][:1]
    data.write(odd)
    (line,) = data.lines()
    assert '3 of 4 images without an annotation' in line
    assert (
        len(
            CocoDataset(
                ann_file=str(data.ann),
                data_prefix=dict(img=''),
                pipeline=[],
                metainfo=dict(classes=CLASSES),
                filter_cfg=dict(filter_empty_gt=True),
            )
        )
        == 1
    )
    odd.pop('annotations')
    data.write(odd)
    assert '4 of 4 images without' in data.lines()[0]


def cut(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def test_missing_and_damaged_images(data):
    for index, share in enumerate((0, 0.5, 0.98)):
        cut(data.images / f'{index}.jpg', share)
    message = data.refusal()
    assert '3 of 4 image files are damaged (0.jpg: has zero bytes, 1.jpg: truncated, ' in message
    assert '2.jpg: truncated)' in message and 'are missing' not in message
    for index in range(4):
        (data.images / f'{index}.jpg').unlink()
    assert '4 of 4 image files are missing (0.jpg, 1.jpg, 2.jpg, ...)' in data.refusal()
    data.images.rmdir()
    assert 'there is no image folder' in data.refusal()


def test_a_page_and_a_folder_are_no_images(data):
    (data.images / '0.jpg').write_text('<html>404</html>')
    (data.images / '1.jpg').unlink()
    (data.images / '1.jpg').mkdir()
    message = data.refusal()
    assert '0.jpg: is no image' in message and '1.jpg: cannot be read' in message


@pytest.mark.parametrize('ending', ['.png', '.jpg', '.bmp', '.webp', '.tiff', '.ppm'])
def test_formats(tmp_path, ending):
    content = coco(2)
    for image in content['images']:
        image['file_name'] = f'{image["id"]}{ending}'
    data = Data(tmp_path, content)
    assert data.lines() == []
    if ending in ('.png', '.jpg'):
        cut(data.images / f'1{ending}', 0.99)
        assert f'1{ending}: truncated' in data.refusal()


def test_what_follows_an_image_is_no_damage(data):
    """Cameras put videos behind pictures; OpenCV reads them. Previews in the head prove nothing."""
    path = data.images / '0.jpg'
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(9000))
    assert cv2.imread(str(path)) is not None and data.lines() == []
    preview = b'\xff\xe1\x00\x06\xff\xd8\xff\xd9' + b'\xff\xe2\x23\x2a' + bytes(9000)
    path.write_bytes(whole[:2] + preview + whole[2:])
    assert cv2.imread(str(path)) is not None and data.lines() == []
    path.write_bytes(whole[:2] + preview + whole[2:-300])
    assert '0.jpg: truncated' in data.refusal()


def config(root, **changes):
    """A config with sound data in both splits."""
    loaders = {}
    for split in ('train', 'val'):
        if not (root / split).exists():
            Data(root, split=split)
        loaders[f'{split}_dataloader'] = dict(
            dataset=dict(
                type='CocoDataset',
                data_root=str(root),
                ann_file=f'{split}.json',
                data_prefix=dict(img=f'{split}/'),
                metainfo=dict(classes=CLASSES),
            )
        )
    cfg = Config(
        dict(val_evaluator=dict(type='CocoMetric', ann_file=str(root / 'val.json')), **loaders)
    )
    cfg.merge_from_dict(changes)
    return cfg


def test_a_config_with_sound_data(tmp_path):
    cfg = config(tmp_path)
    assert check_dataloaders(cfg) == []
    absolute = {
        'val_dataloader.dataset.ann_file': str(tmp_path / 'train.json'),
        'val_dataloader.dataset.data_prefix.img': str(tmp_path / 'train'),
        'val_dataloader.dataset.data_root': '/nowhere',
        'val_evaluator.ann_file': str(tmp_path / 'train.json'),
    }
    assert check_dataloaders(config(tmp_path, **absolute)) == []
    assert check_dataloaders(Config(dict(train_dataloader=None)), ('train', 'test')) == []


def test_classes_of_the_data_sets_type(tmp_path):
    """Without metainfo, the type's own: COCO's 80, of which the file has two."""
    cfg = config(tmp_path)
    cfg.train_dataloader.dataset.pop('metainfo')
    said = refusal(cfg, ('train',))
    assert said.startswith('the training set: 78 of the 80 classes of the config are not among')
    assert 'those that it has, in its order, as metainfo=dict(classes=(...))' in said


def refusal(cfg, splits=('train', 'val')):
    with pytest.raises(UsageError) as caught:
        check_dataloaders(cfg, splits)
    assert '\n' not in str(caught.value)
    return str(caught.value)


def test_wrappers(tmp_path):
    cfg = config(tmp_path)
    inner = cfg.train_dataloader.dataset.to_dict()
    cfg.train_dataloader.dataset = dict(
        type='MultiImageMixDataset',
        dataset=dict(
            type='RepeatDataset',
            times=2,
            dataset=dict(
                type='ConcatDataset', datasets=[inner, {**inner, 'ann_file': 'other.json'}]
            ),
        ),
    )
    message = refusal(cfg)
    assert f"there is no annotation file at '{tmp_path}/other.json'" in message
    assert '--cfg-options train_dataloader.dataset.dataset.dataset.datasets.1.data_root=' in message


@pytest.mark.parametrize(
    'root, said',
    [
        (
            'data/digits/',
            'or name another by `--cfg-options train_dataloader.dataset.data_root=...`',
        ),
        ('data/digits/', '`python tools/make_digits.py` makes it'),
        ('data/digits_video/', '`python tools/make_digits_video.py` makes it'),
        ('data/coco/', 'put COCO there'),
    ],
)
def test_missing_data_sets_by_name(tmp_path, monkeypatch, root, said):
    monkeypatch.chdir(tmp_path)
    message = refusal(config(tmp_path, **{'train_dataloader.dataset.data_root': root}))
    assert said in message and f"'{root}train.json'" in message


def test_a_missing_image_folder(tmp_path):
    message = refusal(config(tmp_path, **{'val_dataloader.dataset.data_prefix.img': 'none'}))
    assert message.startswith(f"the validation set: there is no image folder '{tmp_path}/none'")
    assert 'val_dataloader.dataset.data_prefix.img=...' in message


def test_empty_sets(tmp_path):
    cfg = config(tmp_path)
    (tmp_path / 'val.json').write_text('{"images": []}')
    assert refusal(cfg).startswith('the validation set: ') and 'there are no images' in refusal(cfg)
    (tmp_path / 'train.json').write_text(json.dumps({**coco(), 'annotations': []}))
    assert 'the training set has no annotation that training can use' in refusal(cfg)
    cfg.train_dataloader.dataset.ann_file = None
    assert refusal(cfg).startswith('train_dataloader.dataset has no ann_file')


def test_evaluators(tmp_path):
    cfg = config(tmp_path, **{'val_evaluator.ann_file': str(tmp_path / 'none.json')})
    message = refusal(cfg)
    assert message.startswith('val_evaluator: there is no annotation file at')
    assert 'val_evaluator.ann_file=...' in message
    cfg.val_evaluator.ann_file = 5
    assert refusal(cfg) == 'val_evaluator.ann_file must be one path; got 5'
    cfg.val_evaluator.ann_file = 'none.json'
    cfg.val_evaluator = [dict(type='VOCMetric'), cfg.val_evaluator]
    assert refusal(cfg).startswith('val_evaluator.1: ')
    cfg.val_evaluator[1].ann_file = str(tmp_path / 'train.json')
    (line,) = check_dataloaders(cfg)
    assert line.startswith('val_evaluator.1: compares with')


def test_other_data_sets_are_named(tmp_path):
    cfg = config(tmp_path)
    built = cfg.train_dataloader.dataset
    # Of a class of the user's own, which mmengine's runner takes as it is.
    cfg.train_dataloader = dict(dataset=torch.utils.data.TensorDataset(torch.zeros(3)))
    (line,) = check_dataloaders(cfg, ('train',))
    assert line == 'train_dataloader.dataset: data sets of type TensorDataset are not checked'
    cfg.train_dataloader = dict(dataset=built)
    for kind in ('VOCDataset', 'LVISV1Dataset', 'CocoPanopticDataset'):
        cfg.train_dataloader.dataset.type = kind
        assert str(tmp_path / 'train.json') in refusal(cfg, ('train',))
    cfg.train_dataloader.dataset.type = CocoDataset
    assert check_dataloaders(cfg, ('train',)) == []
    cfg.train_dataloader.dataset.update(data_root='', ann_file='https://x.org/train.json')
    (line,) = check_dataloaders(cfg, ('train',))
    assert 'is not on this disk' in line
    # What its backend needs is needed by a run, too.
    cfg.train_dataloader.dataset.update(data_root='s3://bucket', ann_file='train.json')
    assert 'install petrel_client' in refusal(cfg, ('train',))
    cfg.train_dataloader.dataset.update(data_root=str(tmp_path), ann_file='train.json')
    cfg.train_dataloader.dataset.data_prefix = dict(img_path='train')
    assert 'needs data_prefix=dict(img=' in refusal(cfg, ('train',))


def test_each_line_names_its_split(tmp_path):
    cfg = config(tmp_path)
    odd = coco()
    odd['annotations'][3]['bbox'] = BOXES['partly']
    (tmp_path / 'val.json').write_text(json.dumps(odd))
    (line,) = check_dataloaders(cfg)
    assert line.startswith('the validation set: 1 box(es) partly outside')
