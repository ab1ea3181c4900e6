import copy
import dataclasses

import numpy as np
import pytest

from conftest import rebuilt
from dynamicdet.errors import UsageError
from dynamicdet.routing.record import (
    Detections,
    RoutingRecord,
    read_record,
    require_columns,
    write_record,
)


def make_image(identity, **more):
    generator = np.random.default_rng(identity)

    def found(count):
        return [
            dict(
                bbox=generator.uniform(0, 50, 4).tolist(),
                score=generator.uniform(),
                category_id=int(generator.integers(1, 4)),
            )
            for _ in range(count)
        ]

    return dict(
        id=identity,
        file=f'bild_{identity}_ä.jpg',
        difficulty=generator.uniform(),
        detections=[found(2), found(0), found(identity % 3)],
        **more,
    )


@pytest.fixture
def record():
    return RoutingRecord.from_images(
        [make_image(identity) for identity in (7, 3, 12)],
        gflops=[1.5, 2.0, 1 / 3],
        latencies=[0.01, 0.02, 0.03],
        provenance=dict(config='a.py', images=3, seed=None),
    )


@pytest.fixture
def full(record):
    images = list(record)
    for image in images:
        generator = np.random.default_rng(image['id'])
        image.update(
            losses=[0.5, 0.25, 1e-7],
            features=generator.normal(size=5).astype(np.float32),
            objects=image['id'],
            entropy=7.25,
            view=image['detections'][::-1],
        )
    return rebuilt(record, images)


def test_comes_back_as_it_was(record, tmp_path):
    write_record(record, tmp_path / 'new' / 'record.npz')
    assert read_record(tmp_path / 'new' / 'record.npz') == record
    assert [path.name for path in (tmp_path / 'new').iterdir()] == ['record.npz']


def test_all_that_is_optional_comes_back(full, tmp_path):
    before = copy.deepcopy(full)
    write_record(full, tmp_path / 'record')
    read = read_record(tmp_path / 'record')
    assert read == full == before and read.view is not None
    for image, expected in zip(read, full):
        features = image.pop('features')
        assert features.dtype == np.float32 and (features == expected.pop('features')).all()
        assert image == expected
        assert type(image['objects']) is int and type(image['difficulty']) is float


def test_records_that_differ_anywhere_are_not_equal(full):
    assert full != full.take([0, 1]) and full != full.take([1, 0, 2]) and full != 'else'
    for name in ('losses', 'features', 'objects', 'entropy', 'view'):
        assert full != dataclasses.replace(full, **{name: None})
    other = copy.deepcopy(full)
    other.detections[2].scores[-1] += 0.5
    assert full != other


def test_parts_of_a_record(full):
    images = list(full)
    part = full.take([2, 0, 2])
    assert part.ids.tolist() == [12, 7, 12] and part.provenance == full.provenance
    for image, row in zip(part, (2, 0, 2)):
        assert image['detections'] == images[row]['detections']
        assert image['view'] == images[row]['view'] and image['losses'] == images[row]['losses']
    assert len(full.take([])) == 0 and full[-1]['id'] == 12
    with pytest.raises(IndexError):
        full[3]
    pair = full.take_exits([2, 0])
    assert pair.exits == 2 and (pair.gflops, pair.latencies) == ([1 / 3, 1.5], [0.03, 0.01])
    for image, whole in zip(pair, images):
        for name in ('detections', 'view', 'losses'):
            assert image[name] == [whole[name][2], whole[name][0]]
    assert full.detections[0].images.tolist() == [0, 0, 1, 1, 2, 2]
    assert full.detections[2].offsets.tolist() == [0, 1, 1, 1]


def test_a_detection_takes_24_bytes():
    """A record of the size of COCO's val2017 stays under 100 MB."""
    images, found, exits = 5_000, 100, 2
    offsets = np.arange(images + 1) * found

    def detections():
        count = images * found
        return Detections(
            np.zeros((count, 4), np.float32),
            np.zeros(count, np.float32),
            np.zeros(count, np.int32),
            offsets,
        )

    record = RoutingRecord(
        np.arange(images),
        [''] * images,
        np.zeros(images),
        [detections() for _ in range(exits)],
        [1.0] * exits,
        [1.0] * exits,
        view=[detections() for _ in range(exits)],
        losses=np.zeros((images, exits)),
        features=np.zeros((images, 512), np.float32),
    )
    assert record.nbytes < 100e6
    bare = dataclasses.replace(record, features=None, losses=None)
    assert bare.nbytes == pytest.approx(24 * 2 * exits * images * found, rel=0.01)


def test_files_of_earlier_releases_are_read(full, tmp_path):
    """They hold doubles, and nothing says that detections are in the order of their images."""
    path = tmp_path / 'record.npz'
    write_record(full, path)
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    for name, values in arrays.items():
        if 'boxes' in name or 'scores' in name:
            arrays[name] = values.astype(np.float64)
        elif 'categories' in name or '_images' in name:
            arrays[name] = values.astype(np.int64)
    for part in ('boxes', 'scores', 'categories', 'images'):
        # The second image's detections first; each image's own stay in order.
        arrays[f'detections0_{part}'] = arrays[f'detections0_{part}'][[2, 3, 0, 1, 4, 5]]
    rewrite(path, **arrays)
    assert read_record(path) == full


def test_nothing_found(record, tmp_path):
    record = rebuilt(record, [dict(image, detections=[[], [], []]) for image in record])
    write_record(record, tmp_path / 'record.npz')
    assert read_record(tmp_path / 'record.npz') == record


def test_cut_short_at_any_byte(full, tmp_path):
    write_record(full, tmp_path / 'record.npz')
    content = (tmp_path / 'record.npz').read_bytes()
    for length in range(0, len(content), 97):
        (tmp_path / 'cut.npz').write_bytes(content[:length])
        with pytest.raises(UsageError, match='cut short') as error:
            read_record(tmp_path / 'cut.npz')
        assert '\n' not in str(error.value)


def test_damaged_inside(full, tmp_path):
    """Some bytes of an archive say nothing, such as the time; no other may go unnoticed."""
    write_record(full, tmp_path / 'record.npz')
    content = (tmp_path / 'record.npz').read_bytes()
    refused, places = 0, range(0, len(content), 53)
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 255
        (tmp_path / 'damaged.npz').write_bytes(damaged)
        try:
            assert read_record(tmp_path / 'damaged.npz') == full
        except UsageError:
            refused += 1
    assert refused > len(places) / 2


def rewrite(path, **arrays):
    """Replace arrays of a file (None: leave out)."""
    with np.load(path) as file:
        kept = {name: file[name] for name in file.files}
    kept.update(arrays)
    np.savez_compressed(path, **{name: value for name, value in kept.items() if value is not None})


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(format=np.array('other')), 'no record of a dynamic detector'),
        (dict(format=None), 'no record of a dynamic detector'),
        (dict(version=np.array(99)), 'version 99'),
        (dict(image_difficulty=None), 'lacks image_difficulty'),
        (dict(detections1_scores=None), 'lacks detections1_scores'),
        (dict(image_difficulty=np.zeros(4)), r'difficulty of shape \(4,\)'),
        (dict(image_losses=np.zeros((3, 2))), r'losses of shape \(3, 2\)'),
        (dict(image_features=np.zeros(3, np.float32)), r'features of shape \(3,\)'),
        (dict(detections0_boxes=np.zeros((6, 3))), 'detections0_boxes of shape'),
        (dict(detections0_images=np.full(6, 3)), 'images that it lacks'),
        (dict(image_difficulty=np.array([0.5, np.nan, 0.5])), 'difficulty that are not finite'),
        (dict(gflops=np.ones(1)), 'two exits or more'),
        (dict(image_id=np.zeros(0, int)), 'of 0 images'),
        (dict(provenance=np.array('{"cut')), 'cut short'),
    ],
)
def test_foreign_files(full, tmp_path, change, message):
    path = tmp_path / 'record.npz'
    write_record(full, path)
    rewrite(path, **change)
    with pytest.raises(UsageError, match=message):
        read_record(path)


def test_files_of_other_kinds(tmp_path):
    with pytest.raises(UsageError, match='there is no record'):
        read_record(tmp_path / 'absent.npz')
    (tmp_path / 'text.npz').write_text('hello')
    np.save(tmp_path / 'bare.npy', np.zeros(3))
    # A pickle inside must not be opened.
    np.savez(tmp_path / 'pickle.npz', format=np.array([{}], object))
    for name in ('text.npz', 'bare.npy', 'pickle.npz'):
        with pytest.raises(UsageError, match='no record, or was cut short'):
            read_record(tmp_path / name)


def test_bad_records_are_not_written(full, tmp_path):
    path = tmp_path / 'record.npz'
    images = list(full)

    def refuses(message, images=images, **change):
        with pytest.raises(UsageError, match=message):
            write_record(rebuilt(full, images, **change), path)
        assert not path.exists()

    refuses('no images', images=[])
    refuses('differ', images=[*images[:2], {**images[2], 'more': 1}])
    refuses('beyond its format: more', images=[dict(image, more=1) for image in images])
    refuses('losses of the record', images=[*images[:2], dict(images[2], losses=[0.1])])
    refuses('losses of shape', images=[dict(image, losses=[0.1]) for image in images])
    refuses('not view of so many', images=[*images[:2], dict(images[2], view=[[], []])])
    refuses('costs of 2 exits', gflops=[1.0, 2.0])
    refuses('latencies of shape', latencies=[0.1])
    refuses(
        'losses that are not finite',
        images=[dict(image, losses=[0.1, float('inf'), 0.1]) for image in images],
    )
    broken = copy.deepcopy(images)
    broken[0]['detections'][0][0]['bbox'][2] = float('nan')
    refuses('detections0_boxes that are not finite', images=broken)


def test_require(full):
    require_columns(full, 'losses', 'features')
    full.losses = None
    with pytest.raises(UsageError, match='lacks losses'):
        require_columns(full, 'features', 'losses')


def test_a_failed_write_leaves_the_old_file(record, tmp_path):
    path = tmp_path / 'record.npz'
    write_record(record, path)
    with pytest.raises(UsageError):
        write_record(record.take([]), path)
    assert read_record(path) == record
