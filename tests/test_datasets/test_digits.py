import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from digits_cases import content, load, painted_photos
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO

from dynamicdet.datasets import digits, digits_drawing

SIZES = dict(train=120, val=40, test=40)
FEW = dict(train=4, val=2, test=0)


@pytest.fixture(scope='module')
def sources():
    return digits_drawing.load_sources()


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return digits.make_digits(tmp_path_factory.mktemp('data') / 'digits', SIZES)


def start(code, root):
    """Run code that sees `make_digits`, `root` and `sizes` in a process of its own.

    It imports the folder alone: the package would bring in mmdet, which takes seconds.
    """
    head = (
        'import sys, time\n'
        f'sys.path.insert(0, {str(Path(digits.__file__).parents[1])!r})\n'
        'from datasets.digits import make_digits\n'
        f'root, sizes = {str(root)!r}, {FEW!r}\n'
    )
    return subprocess.Popen([sys.executable, '-c', head + code], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize('split', digits_drawing.SPLITS)
def test_counts_and_coco(root, split):
    coco = COCO(str(root / 'annotations' / f'instances_{split}.json'))
    assert len(coco.imgs) == SIZES[split] == len(list((root / split).iterdir()))
    assert [(c['id'], c['name']) for c in coco.loadCats(coco.getCatIds())] == list(
        enumerate(digits.CLASSES, start=1)
    )
    assert sorted(coco.anns) == list(range(1, len(coco.anns) + 1))
    for entry in coco.imgs.values():
        picture = cv2.imread(str(root / split / entry['file_name']))
        assert picture.shape == (entry['height'], entry['width'], 3) == (128, 128, 3)
        number = len(coco.getAnnIds(entry['id']))
        assert number == entry['recipe']['number']
        assert number <= 2 if entry['difficulty'] <= 0.5 else number >= 5


@pytest.mark.parametrize('split', digits_drawing.SPLITS)
def test_boxes_are_tight_around_masks(root, split):
    coco = COCO(str(root / 'annotations' / f'instances_{split}.json'))
    for entry in coco.imgs.values():
        covered = np.zeros((128, 128), int)
        for annotation in coco.loadAnns(coco.getAnnIds(entry['id'])):
            assert isinstance(annotation['segmentation']['counts'], str)
            assert annotation['iscrowd'] == 0
            mask = coco.annToMask(annotation)
            ys, xs = np.nonzero(mask)
            x, y, w, h = annotation['bbox']
            assert (x, y, x + w, y + h) == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
            assert 0 <= x and 0 <= y and x + w <= 128 and y + h <= 128
            assert annotation['area'] == mask.sum() > 0
            covered += mask
        assert covered.max() <= 1  # visible parts alone: no pixel belongs to two digits


def test_masks_lie_on_the_ink(sources):
    """What changed between the background and the picture is what the masks cover."""
    for index in range(6):
        picture, owner, *_ = digits_drawing.make_image(sources, 'train', index, 192, seed=0)
        rng = np.random.default_rng([0, 0, index])
        _, recipe = digits_drawing.draw_recipe(rng, hard=index % 2 == 1)
        photo, _ = digits_drawing.draw_background(rng, sources.photos, 'train', 192)
        changed = (digits_drawing._blur(photo, recipe) != picture).any(2)
        assert changed[owner >= 0].mean() > 0.99
        # Outside there is at most the soft edge, one pixel or two.
        near = cv2.dilate((owner >= 0).astype(np.uint8), np.ones((9, 9)))
        assert not changed[near == 0].any()


def test_no_digit_is_hidden_by_more_than_half(sources, monkeypatch):
    place, full = digits_drawing._place, []

    def record(*args):
        placed = place(*args)
        if placed is not None:
            full.append((placed[0] >= 0.5).sum())
        return placed

    monkeypatch.setattr(digits_drawing, '_place', record)
    shares = []
    for index in range(1, 120, 2):
        full.clear()
        _, owner, rows, _ = digits_drawing.make_image(sources, 'val', index, 192, seed=3)
        shares += [(owner == i).sum() / full[i] for i in range(len(rows))]
    assert 0.5 <= min(shares) < 0.9  # some overlap, never more than half
    assert np.mean(np.array(shares) == 1) > 0.5


def test_splits_share_no_handwriting(root, sources):
    used = {}
    for split in digits_drawing.SPLITS:
        annotations = load(root, split)['annotations']
        used[split] = {a['sample'] for a in annotations}
        assert all(sources.labels[a['sample']] == a['category_id'] - 1 for a in annotations)
        assert used[split] <= set(sources.samples[split].tolist())
        # Stratified: each class has its tenth.
        shares = np.bincount(sources.labels[sources.samples[split]], minlength=10)
        assert shares.max() - shares.min() <= 0.1 * shares.mean() + 2
    rows = np.concatenate(list(sources.samples.values()))
    assert sorted(rows) == list(range(1797))  # each sample in one split, exactly


def test_splits_share_no_pixel_of_a_photo(root, sources):
    seen = {name: np.zeros(photo.shape[:2], int) for name, photo in sources.photos.items()}
    for bit, split in enumerate(digits_drawing.SPLITS):
        for image in load(root, split)['images']:
            x1, y1, x2, y2 = image['crop']
            seen[image['photo']][y1:y2, x1:x2] |= 1 << bit
    assert len(seen) == len(digits_drawing.PHOTOS)
    for name, bits in seen.items():
        assert set(np.unique(bits)) <= {0, 1, 2, 4}, name


@pytest.mark.parametrize('split', digits_drawing.SPLITS)
def test_background_uses_the_regions_of_its_split_alone(sources, split):
    """Paint every photo with its owners' colors: a background shows one color."""
    painted = painted_photos(sources)
    rng = np.random.default_rng(0)
    for _ in range(100):
        background, _ = digits_drawing.draw_background(rng, painted, split, 64)
        assert (background == 80 * (digits_drawing.SPLITS.index(split) + 1)).all()


def test_difficulty(root):
    images = [image for split in digits_drawing.SPLITS for image in load(root, split)['images']]
    difficulty = np.array([image['difficulty'] for image in images])
    assert difficulty.min() >= 0 and difficulty.max() <= 1
    assert (difficulty > 0.5).mean() == 0.5
    easy = difficulty < 0.5
    assert len(np.unique(difficulty)) > 0.8 * len(images)  # continuous, not two levels
    signs = dict(number=1, size=-1, overlap=1, contrast=-1, clutter=1)
    for name, sign in signs.items():
        values = sign * np.array([image['recipe'][name] for image in images])
        assert np.corrcoef(difficulty, values)[0, 1] > 0.8, name
    for half in (easy, ~easy):
        number = np.array([image['recipe']['number'] for image in images])[half]
        assert np.corrcoef(difficulty[half], number)[0, 1] > 0.5


def test_same_seed_same_bytes(tmp_path):
    a, b, c = (
        digits.make_digits(tmp_path / name, FEW, seed=seed)
        for name, seed in (('a', 5), ('b', 5), ('c', 6))
    )
    assert content(a) == content(b)
    assert not set(content(a).values()) & set(content(c).values())


def test_counts_do_not_change_earlier_images(root, tmp_path):
    few = digits.make_digits(tmp_path / 'few', FEW)
    for path in few.glob('*/*.jpg'):
        assert path.read_bytes() == (root / path.relative_to(few)).read_bytes()
    for split, count in FEW.items():
        assert load(few, split)['images'] == load(root, split)['images'][:count]
    one = [a for a in load(root, 'val')['annotations'] if a['image_id'] <= FEW['val']]
    assert load(few, 'val')['annotations'] == one


def test_empty_splits_and_smallest_images(tmp_path):
    root = digits.make_digits(tmp_path / 'd', dict(train=0, val=8, test=0), image_size=64)
    coco = COCO(str(root / 'annotations' / 'instances_train.json'))
    assert not coco.imgs and not coco.anns and len(coco.cats) == 10
    assert (root / 'train').is_dir() and len(load(root, 'val')['images']) == 8


def test_is_made_once(tmp_path):
    calls = []
    for _ in range(2):
        made = digits.make_digits(tmp_path / 'd', FEW, progress=lambda *a: calls.append(a))
    assert made == tmp_path / 'd'
    assert calls == [(i + 1, 6) for i in range(6)]


def test_kill_leaves_nothing_and_a_rerun_succeeds(tmp_path):
    root = tmp_path / 'd'
    process = start(
        'def wait(done, total):\n'
        '    if done == 5:\n'
        '        print("half way", flush=True)\n'
        '        time.sleep(60)\n'
        'make_digits(root, sizes, progress=wait)',
        root,
    )
    assert process.stdout.readline() == 'half way\n'
    assert any(tmp_path.glob('.d.digits-part-*/train/*.jpg'))
    process.kill()  # SIGKILL
    assert process.wait() == -9
    assert not root.exists()
    digits.make_digits(root, FEW)
    assert len(list(root.glob('*/*.jpg'))) == 6
    assert not list(tmp_path.glob('.d.digits-part-*'))  # what the killed one left is gone


def test_a_failure_leaves_nothing(tmp_path):

    def fail(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        digits.make_digits(tmp_path / 'd', FEW, progress=fail)
    assert [p.name for p in tmp_path.iterdir()] == ['.d.lock']


def test_two_processes_at_once(tmp_path):
    code = (
        'calls = []\n'
        'make_digits(root, sizes, progress=lambda *a: (calls.append(a), time.sleep(0.1)))\n'
        'print(len(calls))'
    )
    processes = [start(code, tmp_path / 'd') for _ in range(2)]
    made = sorted(int(p.communicate(timeout=600)[0]) for p in processes)
    assert [p.returncode for p in processes] == [0, 0]
    assert made == [0, 6]  # the second waited for the first
    other = digits.make_digits(tmp_path / 'other', FEW)
    assert content(tmp_path / 'd') == content(other)


@pytest.mark.parametrize(
    'bad',
    [
        dict(sizes=dict(train=-1, val=0, test=0)),
        dict(sizes=dict(train=1.5, val=0, test=0)),
        dict(sizes=dict(train=1)),
        dict(sizes=dict(train=1, val=1, test=1, more=1)),
        dict(image_size=63),
        dict(image_size='192'),
        dict(seed=-1),
        dict(seed=None),
    ],
)
def test_bad_arguments(tmp_path, bad):
    with pytest.raises(ValueError, match='must'):
        digits.make_digits(tmp_path / 'd', **bad)
    assert not list(tmp_path.iterdir())


def test_a_users_folder_is_left_alone(tmp_path):
    mine = tmp_path / 'mine'
    (mine / 'annotations').mkdir(parents=True)
    (mine / 'annotations' / 'instances_train.json').write_text('[]')
    (tmp_path / 'file').write_text('mine')
    for path in (mine, tmp_path / 'file'):
        before = content(tmp_path)
        with pytest.raises(FileExistsError, match='another root'):
            digits.make_digits(path, FEW)
        assert content(tmp_path) == before


def test_a_set_with_other_settings_is_left_alone(tmp_path):
    root = digits.make_digits(tmp_path / 'd', FEW)
    before = content(root)
    with pytest.raises(FileExistsError, match="'seed': 0.*'seed': 1"):
        digits.make_digits(root, FEW, seed=1)
    assert content(root) == before
    shutil.rmtree(root / 'annotations')
    with pytest.raises(FileExistsError, match='something else'):
        digits.make_digits(root, FEW)


def test_an_empty_folder_is_used(tmp_path):
    (tmp_path / 'd').mkdir()
    root = digits.make_digits(tmp_path / 'd', FEW)
    assert len(list(root.glob('*/*.jpg'))) == 6
    assert os.access(root, os.R_OK | os.X_OK)


def test_masks_keep_holes(root):
    """Run lengths, not outlines: a zero has a hole."""
    zeros = [
        a for a in load(root, 'train')['annotations'] if a['category_id'] == 1 and a['area'] > 1000
    ]
    holes = 0
    for zero in zeros:
        mask = mask_utils.decode(zero['segmentation'])
        holes += len(cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)[0]) > 1
    assert holes > 0.8 * len(zeros) > 0
