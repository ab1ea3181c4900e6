"""The built-in videos: what is in them, that boxes are right, that nothing leaks or is left
behind."""

import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import cv2
import numpy as np
import pytest
from digits_cases import content, load, painted_photos
from pycocotools.coco import COCO

from dynamicdet.datasets import digits, digits_drawing
from dynamicdet.video import digits_video
from dynamicdet.video import digits_video_drawing as drawing

SIZES = dict(train=8, val=4, test=4)
FEW = dict(train=2, val=1, test=0)
LENGTH = 30


@pytest.fixture(scope='module')
def sources():
    return digits_drawing.load_sources()


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return digits_video.make_digits_video(tmp_path_factory.mktemp('data') / 'videos', SIZES, LENGTH)


@pytest.fixture(scope='module')
def frames(sources):
    """(frame, the one before or None) of twelve videos."""
    found = []
    for index in range(12):
        own = list(drawing.make_video(sources, 'train', index, 128, LENGTH, 0)[1])
        found += zip(own, [None, *own])
    return found


@pytest.mark.parametrize('split', digits_drawing.SPLITS)
def test_cocovid(root, split):
    data = load(root, split)
    coco = COCO(str(root / 'annotations' / f'instances_{split}.json'))
    assert [video['id'] for video in data['videos']] == list(range(1, SIZES[split] + 1))
    assert [(c['id'], c['name']) for c in data['categories']] == list(
        enumerate(digits.CLASSES, start=1)
    )
    assert sorted(coco.anns) == list(range(1, len(coco.anns) + 1))
    times = [(image['video_id'], image['frame_id']) for image in data['images']]
    assert times == [
        (video, frame) for video in range(1, SIZES[split] + 1) for frame in range(LENGTH)
    ]
    faces = [video['face'] for video in data['videos']]
    assert faces == [drawing.FACES[place % 4] for place in range(SIZES[split])]
    for image in data['images']:
        assert cv2.imread(str(root / split / image['file_name'])).shape == (128, 128, 3)
        assert image['number'] == len(coco.getAnnIds(image['id']))
    for video in data['videos']:
        assert (root / split / f'{video["name"]}.mp4').is_file()
        assert sum(shot['frames'] for shot in video['shots']) == video['length'] == LENGTH


def test_boxes_are_tight_around_what_is_visible(root):
    coco = COCO(str(root / 'annotations' / 'instances_train.json'))
    for image in list(coco.imgs)[::7]:
        covered = np.zeros((128, 128), int)
        for annotation in coco.loadAnns(coco.getAnnIds(image)):
            mask = coco.annToMask(annotation)
            ys, xs = np.nonzero(mask)
            x, y, w, h = annotation['bbox']
            assert (x, y, x + w, y + h) == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
            assert annotation['area'] == mask.sum() > 0
            assert annotation['iscrowd'] == (annotation['visible'] < 0.25)
            covered += mask
        assert covered.max() <= 1


def test_a_digit_keeps_its_number_until_the_cut(root):
    data = load(root, 'train')
    images = {image['id']: image for image in data['images']}
    for video in data['videos']:
        shots, edges = {}, np.cumsum([shot['frames'] for shot in video['shots']])
        for one in (a for a in data['annotations'] if a['video_id'] == video['id']):
            shot = np.searchsorted(edges, images[one['image_id']]['frame_id'], side='right')
            shots.setdefault(one['instance_id'], set()).add(
                (one['sample'], one['category_id'], shot)
            )
        assert all(len(facts) == 1 for facts in shots.values())
        own = [image for image in data['images'] if image['video_id'] == video['id']]
        cuts = [image['frame_id'] for image in own if image['cut']]
        assert cuts == edges[:-1].tolist()


def test_the_films_show_the_same_as_the_frames(root):
    import av

    for path in sorted(root.glob('val/*.mp4')):
        with av.open(str(path)) as container:
            film = [frame.to_ndarray(format='bgr24') for frame in container.decode(video=0)]
        assert len(film) == LENGTH
        for number in (0, 7, LENGTH - 1):
            frame = cv2.imread(str(path.with_suffix('') / f'{number + 1:06d}.jpg'))
            assert np.abs(film[number].astype(int) - frame).mean() < 8


def change(frame, before):
    return np.abs(frame.picture.astype(int) - before.picture).mean()


def test_still_frames_differ_by_noise_alone(frames):
    still = [change(*pair) for pair in frames if pair[1] is not None and pair[0].facts['still']]
    moved = [change(*pair) for pair in frames if pair[0].facts['camera'] > 1]
    cuts = [change(*pair) for pair in frames if pair[0].facts['cut']]
    assert 0.2 < len(still) / len(frames) < 0.6 and len(cuts) > 4 and len(moved) > 20
    # Two draws of noise of at most 3 levels differ by 3.4 in the mean; never are frames the same.
    assert 0.3 < min(still) and max(still) < 3.5
    assert np.median(moved) > 2 * np.median(still) and np.median(cuts) > 5 * np.median(still)
    for frame, before in frames:
        if frame.facts['still']:
            assert (frame.owner == before.owner).all() and frame.digits == before.digits
        if frame.facts['cut']:
            assert not {digit[0] for digit in frame.digits} & {digit[0] for digit in before.digits}


def test_all_that_is_promised_happens(frames):
    facts = [frame.facts for frame, _ in frames]
    assert any(fact['light'] < 0.7 for fact in facts)
    assert any(0.02 < abs(fact['light'] - 1) < 0.2 for fact in facts)
    assert any(fact['occlusion'] > 0.5 for fact in facts) and any(
        fact['number'] > 5 for fact in facts
    )
    assert any(fact['motion'] > 1 and fact['camera'] == 0 for fact in facts)
    assert any(fact['motion'] < 0.1 and fact['camera'] > 1 for fact in facts)
    assert {fact['difficulty'] > 0.5 for fact in facts} == {False, True}


def world(value=100, side=160):
    return np.full((side, side, 3), value, np.uint8)


def item(path, **facts):
    """A white bar of 2 by 8 original pixels, or what is given instead."""
    ink = np.zeros((96, 96), np.uint8)
    ink[16:80, 40:56] = 255
    path = np.array(path, float)
    many = np.ones(len(path))
    return drawing.Item(
        **{
            **dict(
                path=path,
                height=40 * many,
                angle=0 * many,
                row=5,
                ink=ink,
                color=np.full(3, 255.0),
                contrast=1.0,
            ),
            **facts,
        }
    )


def shot(items, camera=((64, 64),), light=(1,), **facts):
    facts = dict(difficulty=0.3, **facts)
    return drawing.Shot(world(), np.array(camera, float), np.array(light, float), items, facts)


def draw(one, t=0, noise=0.0):
    return drawing._draw_frame(one, t, False, 10, np.full((128, 128, 3), noise, np.float32))


def box(frame, place=0):
    ys, xs = np.nonzero(frame.owner == place)
    return xs.min(), ys.min(), xs.max() + 1, ys.max() + 1


def test_a_digit_is_where_its_path_says():
    frame = draw(shot([item([(50, 80)])]))
    # 40 high and 10 wide around (50, 80); the camera looks at (0, 0) to (128, 128).
    assert np.abs(np.array(box(frame)) - (45, 60, 55, 100)).max() <= 1
    assert frame.digits == [(10, 5, 1.0)] and frame.picture[80, 50].tolist() == [255] * 3
    assert frame.picture[80, 90].tolist() == [100] * 3
    # The camera goes right and down: all else goes left and up.
    moved = draw(shot([item([(50, 80)])], camera=[(74, 69)]))
    assert (np.array(box(frame)) - box(moved)).tolist() == [10, 5, 10, 5]
    assert draw(shot([item([(250, 80)])])).digits == []
    # Half of it is outside.
    ((_, _, visible),) = draw(shot([item([(50, 0)])])).digits
    assert visible == pytest.approx(0.5, abs=0.03)


def test_patches_and_digits_hide_what_is_behind():
    patch = item([(50, 90)], row=-1, ink=np.full((20, 20, 3), 7, np.uint8), height=np.array([20]))
    frame = draw(shot([item([(50, 80)]), patch]))
    # Rows 80 to 100 of 60 to 100.
    assert frame.digits == [(10, 5, pytest.approx(0.5, abs=0.03))]
    assert frame.picture[90, 50].tolist() == [7] * 3
    assert frame.facts['occlusion'] == pytest.approx(0.5, abs=0.03)
    assert draw(shot([patch, item([(50, 80)])])).facts['occlusion'] == 0
    both = draw(shot([item([(50, 80)]), item([(50, 80)], row=6)]))
    assert (
        both.digits == [(11, 6, 1.0)] and both.facts['number'] == 1 and both.facts['occlusion'] == 1
    )
    # Outside of the frame is not hidden by anything.
    assert draw(shot([item([(50, 0)])])).facts['occlusion'] == 0


def test_light_and_noise():
    one = shot([], camera=[(64, 64)] * 2, light=[1, 0.5])
    assert (draw(one).picture == 100).all() and (draw(one, 1).picture == 50).all()
    assert (draw(one, noise=9).picture == 109).all() and (draw(one, noise=200).picture == 255).all()
    assert not draw(one, 1).facts['still'] and draw(one, 1).facts['light'] == 0.5
    assert draw(shot([], camera=[(64, 64)] * 2, light=[1, 1]), 1).facts['still']


def test_fast_things_are_smeared():
    still, fast = (
        draw(shot([item([(40, 64), (40 + step, 64)])], [(64, 64)] * 2, [1, 1]), 1)
        for step in (0, 20)
    )
    assert fast.facts['motion'] == 20 and not fast.facts['still'] and still.facts['still']

    def edge(frame):
        row = frame.picture[64, :, 0].astype(int)
        return ((row > 110) & (row < 240)).sum()

    # The shutter is open for 14 of 20 pixels: longer than the bar is wide.
    assert edge(still) <= 4 and edge(fast) > 12
    # A camera that follows it sees it sharp.
    follow = draw(shot([item([(40, 64), (60, 64)])], [(64, 64), (84, 64)], [1, 1]), 1)
    assert edge(follow) <= 4 and follow.facts['camera'] == 20


def test_smearing_keeps_the_sum():
    dot = np.zeros((41, 41), np.float32)
    dot[20, 20] = 1
    for step in ((10, 0), (0, 10), (7, -7)):
        smeared = drawing._smear(dot, np.array(step, float))
        ys, xs = np.nonzero(smeared)
        assert smeared.sum() == pytest.approx(1, abs=1e-5)
        assert (
            abs(np.ptp(xs) - 0.7 * abs(step[0])) <= 1 and abs(np.ptp(ys) - 0.7 * abs(step[1])) <= 1
        )
    assert drawing._smear(dot, np.array([1.0, 0.5])) is dot


def test_paths_turn_back_at_the_ends():
    path = np.array([[0.0], [4], [10], [13], [20], [27], [-3]])
    assert drawing._fold(path, np.array([0.0]), np.array([10.0]))[:, 0].tolist() == [
        0,
        4,
        10,
        7,
        0,
        7,
        3,
    ]
    assert (
        drawing._fold(path, np.array([6.0]), np.array([2.0]))[:, 0].tolist() == [4] * 7
    )  # no room


@pytest.mark.parametrize('length', [1, 5, 23, 24, 60])
def test_plans_fill_the_video(length):
    rng = np.random.default_rng(0)
    for face in drawing.FACES:
        for _ in range(40):
            plan = drawing._draw_plan(rng, face, length)
            assert sum(frames for frames, _ in plan) == length and 1 <= len(plan) <= 3
            assert len(plan) == 1 or min(frames for frames, _ in plan) >= drawing.SHORTEST_SHOT
            hard = [one for _, one in plan]
            if face in ('easy', 'hard'):
                assert set(hard) == {face == 'hard'}
            if face == 'mixed' and length >= 24:
                assert len(plan) >= 2 and all(a != b for a, b in zip(hard, hard[1:]))
            if face == 'calm':
                assert len(plan) == 1


def test_splits_share_no_handwriting_and_no_pixel(root, sources):
    seen = {name: np.zeros(photo.shape[:2], int) for name, photo in sources.photos.items()}
    for bit, split in enumerate(digits_drawing.SPLITS):
        data = load(root, split)
        assert {a['sample'] for a in data['annotations']} <= set(sources.samples[split].tolist())
        assert all(sources.labels[a['sample']] == a['category_id'] - 1 for a in data['annotations'])
        for source in (
            one for video in data['videos'] for shot in video['shots'] for one in shot['sources']
        ):
            x1, y1, x2, y2 = source['crop']
            seen[source['photo']][y1:y2, x1:x2] |= 1 << bit
    assert all(set(np.unique(bits)) <= {0, 1, 2, 4} for bits in seen.values())


@pytest.mark.parametrize('split', digits_drawing.SPLITS)
def test_pictures_use_the_regions_of_their_split_alone(sources, split):
    """Paint every photo with its owners' colors: worlds and patches show one color."""
    painted = painted_photos(sources)
    rng, color = np.random.default_rng(0), 80 * (digits_drawing.SPLITS.index(split) + 1)
    for _ in range(40):
        place, _ = drawing._draw_world(rng, painted, split, 64, 0.5)
        assert (place == color).all() and min(place.shape[:2]) >= 64
        patches, _ = drawing._draw_patches(rng, painted, split, place, np.ones(3, bool), True, 64)
        assert all((patch.ink == color).all() for patch in patches)


def test_same_seed_same_bytes_and_counts_do_not_matter(root, tmp_path):
    few, other = (
        digits_video.make_digits_video(tmp_path / name, FEW, LENGTH, seed=seed)
        for name, seed in (('few', 0), ('other', 1))
    )
    files = {name: code for name, code in content(few).items() if not name.endswith('.json')}
    assert len(files) == 3 * (LENGTH + 1)
    assert all(code == (root / name).read_bytes() for name, code in files.items())
    assert not set(files.values()) & set(content(other).values())
    assert load(few, 'val')['images'] == load(root, 'val')['images'][:LENGTH]
    again = digits_video.make_digits_video(tmp_path / 'again', FEW, LENGTH)
    assert content(again) == content(few)


def test_smallest_sets(tmp_path):
    root = digits_video.make_digits_video(
        tmp_path / 'd', dict(train=0, val=2, test=0), 1, image_size=65, mp4=False
    )
    assert load(root, 'train')['images'] == [] and len(load(root, 'val')['images']) == 2
    assert cv2.imread(str(root / 'val' / '0002' / '000001.jpg')).shape == (65, 65, 3)
    assert not list(root.glob('*/*.mp4'))


def test_odd_sizes_have_films(tmp_path):
    root = digits_video.make_digits_video(
        tmp_path / 'd', dict(train=1, val=0, test=0), 2, image_size=65
    )
    assert (root / 'train' / '0001.mp4').is_file()


def test_is_made_once(tmp_path):
    calls = []
    for _ in range(2):
        made = digits_video.make_digits_video(
            tmp_path / 'd', FEW, 2, progress=lambda *a: calls.append(a)
        )
    assert made == tmp_path / 'd' and calls == [(1, 3), (2, 3), (3, 3)]
    with pytest.raises(FileExistsError, match="'length': 2.*'length': 3"):
        digits_video.make_digits_video(tmp_path / 'd', FEW, 3)
    shutil.rmtree(tmp_path / 'd' / 'annotations')
    with pytest.raises(FileExistsError, match='something else'):
        digits_video.make_digits_video(tmp_path / 'd', FEW, 2)


def test_kill_leaves_nothing_and_a_rerun_succeeds(tmp_path):
    # Without the package's __init__, which brings in mmdet and takes seconds.
    projects = str(Path(digits.__file__).parents[2])
    code = textwrap.dedent(f"""
        import sys, time, types
        for name in ('dynamicdet', 'dynamicdet.video'):
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = [{projects!r} + '/' + name.replace('.', '/')]
        from dynamicdet.video.digits_video import make_digits_video

        def wait(done, total):
            print('half way', flush=True)
            time.sleep(60)

        make_digits_video({str(tmp_path / 'd')!r}, {FEW!r}, 2, progress=wait)
    """)
    process = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == 'half way\n'
    assert any(tmp_path.glob('.d.digits-video-part-*/train/0001/*.jpg'))
    process.kill()
    assert process.wait() == -9
    assert not (tmp_path / 'd').exists()
    digits_video.make_digits_video(tmp_path / 'd', FEW, 2)
    assert len(list((tmp_path / 'd').glob('*/*/*.jpg'))) == 6
    assert not list(tmp_path.glob('.d.digits-video-part-*'))


@pytest.mark.parametrize(
    'bad',
    [
        dict(sizes=dict(train=-1, val=0, test=0)),
        dict(sizes=dict(train=1)),
        dict(length=0),
        dict(length=2.5),
        dict(image_size=63),
        dict(seed=-1),
    ],
)
def test_bad_arguments(tmp_path, bad):
    with pytest.raises(ValueError, match='must'):
        digits_video.make_digits_video(tmp_path / 'd', **bad)
    assert not list(tmp_path.iterdir())
