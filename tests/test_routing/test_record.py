import copy

import numpy as np
import pytest

from dynamicdet.errors import UsageError
from dynamicdet.routing.record import read_record, require, write_record


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
    return dict(
        images=[make_image(identity) for identity in (7, 3, 12)],
        gflops=[1.5, 2.0, 1 / 3],
        latencies=[0.01, 0.02, 0.03],
        provenance=dict(config='a.py', images=3, seed=None),
    )


@pytest.fixture
def full(record):
    for image in record['images']:
        generator = np.random.default_rng(image['id'])
        image.update(
            losses=[0.5, 0.25, 1e-7],
            features=generator.normal(size=5).astype(np.float32),
            objects=image['id'],
            entropy=7.25,
            view=copy.deepcopy(image['detections'][::-1]),
        )
    return record


def without_features(record):
    return dict(
        record,
        images=[
            {name: value for name, value in image.items() if name != 'features'}
            for image in record['images']
        ],
    )


def test_comes_back_as_it_was(record, tmp_path):
    write_record(record, tmp_path / 'new' / 'record.npz')
    assert read_record(tmp_path / 'new' / 'record.npz') == record
    assert [path.name for path in (tmp_path / 'new').iterdir()] == ['record.npz']


def test_all_that_is_optional_comes_back(full, tmp_path):
    before = copy.deepcopy(full)
    write_record(full, tmp_path / 'record')
    read = read_record(tmp_path / 'record')
    assert without_features(read) == without_features(full) == without_features(before)
    for image, expected in zip(read['images'], full['images']):
        assert image['features'].dtype == np.float32
        assert (image['features'] == expected['features']).all()
        assert type(image['objects']) is int and type(image['difficulty']) is float


def test_nothing_found(record, tmp_path):
    for image in record['images']:
        image['detections'] = [[], [], []]
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
    write_record(full, tmp_path / 'record.npz')
    content = bytearray((tmp_path / 'record.npz').read_bytes())
    content[len(content) // 3] ^= 255
    (tmp_path / 'record.npz').write_bytes(content)
    with pytest.raises(UsageError, match='no record, or was cut short'):
        read_record(tmp_path / 'record.npz')


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
    images = full['images']

    def refuses(message, **change):
        with pytest.raises(UsageError, match=message):
            write_record({**full, **change}, path)
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
    require(full, 'losses', 'features')
    del full['images'][1]['losses']
    with pytest.raises(UsageError, match='lacks losses'):
        require(full, 'features', 'losses')


def test_a_failed_write_leaves_the_old_file(record, tmp_path):
    path = tmp_path / 'record.npz'
    write_record(record, path)
    with pytest.raises(UsageError):
        write_record(dict(record, images=[]), path)
    assert read_record(path) == record
