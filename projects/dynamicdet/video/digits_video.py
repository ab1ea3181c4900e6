"""`digits-video`: a video detection data set that every machine can make in seconds, offline.

The handwriting and the photographs of `digits` in motion: a camera pans over a photo and stands
still, digits move and pass behind each other and behind patches, light changes, fast things are
smeared, shots are cut. A quarter of the videos each is easy, hard, mixed (changes with each shot)
and calm (a camera that stands; mostly nothing moves).

In CocoVID format: frames are JPEG files, boxes and masks are of what is visible, a digit keeps its
``instance_id`` until the cut. What is seen of less than a quarter of a digit is marked ``iscrowd``:
neither right nor wrong to find. An H.264 file of each video lies beside its folder of frames, made
from the same pictures before they became JPEG; it is for demos.

Each frame's entry in the annotation file carries, **for analysis only** (no model may read them):

    difficulty   of its shot, float in [0, 1], below 0.5 in easy ones, above in hard ones
    still        whether nothing changed since the frame before but the sensor's noise
    cut          whether it is the first frame of another shot
    camera, motion   pixels since the frame before: of the camera, of the fastest item in view
    light        what gray levels were multiplied by, 1 in even light
    occlusion    the largest share of a digit in view that others hide
    number       digits of which something is seen

each annotation ``sample`` (row in scikit-learn's data) and ``visible`` (share in [0, 1]), each
video its ``face`` and its ``shots`` with their recipes and ``sources``, the photos' parts that its
pixels come from. The splits share neither a sample nor a pixel of a photo.
"""

from collections.abc import Callable
from pathlib import Path

from ..datasets.digits import Kind, make_once, outline, require_whole, write_jpeg
from ..datasets.digits_drawing import SPLITS
from .digits_video_drawing import make_video

#: Videos.
SIZES = dict(train=120, val=20, test=40)

# Raise it whenever the same arguments give other frames or annotations.
VERSION = 1

FPS = 25
MIN_IMAGE_SIZE = 64  # as in `digits`
MIN_VISIBLE = 0.25  # by eye: less of a digit can often not be told


def make_digits_video(
    root,
    sizes: dict = SIZES,
    length: int = 60,
    image_size: int = 128,
    seed: int = 0,
    mp4: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Make the data set at `root`, unless it is there already.

    Writes `{train,val,test}/0001/000001.jpg ...`, `{train,val,test}/0001.mp4 ...` and
    `annotations/instances_{train,val,test}.json`. As `make_digits` does, it builds the set in a
    hidden sibling folder and renames it when complete; a second process waits for the first. A
    video depends on the seed, its split, its index, `length` and `image_size` alone.

    Args:
        root (str | Path): Folder to make; missing, empty, or made by this function before.
        sizes (dict): Videos per split, all of train, val and test; 0 gives an empty split.
        length (int): Frames per video, at least 1.
        image_size (int): Height and width of the frames, at least 64.
        seed (int): At least 0. Same seed, same machine: identical bytes.
        mp4 (bool): Whether to write the H.264 files, which need PyAV.
        progress (Callable, optional): Called with (videos made, videos in all) after each one.

    Returns:
        Path: `root`.

    Raises:
        ValueError: On bad arguments, or when PyAV is missing.
        FileExistsError: When `root` holds something else; nothing is ever removed there.
        ImportError: When scikit-learn or scikit-image is missing.
    """
    stamp = _stamp(sizes, length, image_size, seed, mp4)
    description = 'handwritten digits moving over photographs'
    kind = Kind('digits-video', description, ('videos', 'images'), _write_video)
    return make_once(root, stamp, kind, progress)


def _stamp(sizes, length, image_size, seed, mp4):
    """Check the arguments; what identifies the data set."""
    if set(sizes) != set(SPLITS):
        raise ValueError(f'sizes must give train, val and test, got {sorted(sizes)}')
    return dict(
        kind='video',
        version=VERSION,
        seed=require_whole('seed', seed, 0),
        length=require_whole('length', length, 1),
        image_size=require_whole('image_size', image_size, MIN_IMAGE_SIZE),
        mp4=bool(mp4),
        sizes={split: require_whole(f'sizes[{split!r}]', sizes[split], 0) for split in SPLITS},
    )


def _write_video(folder, sources, split, index, stamp, content):
    """Write a video's files; add its entry, frames and objects to the content of the annotation
    file."""
    images, annotations = content['images'], content['annotations']
    size, name = stamp['image_size'], f'{index + 1:04d}'
    facts, frames = make_video(sources, split, index, size, stamp['length'], stamp['seed'])
    (folder / name).mkdir()
    pictures = []
    for number, frame in enumerate(frames):
        entry = dict(
            id=len(images) + 1,
            file_name=f'{name}/{number + 1:06d}.jpg',
            height=size,
            width=size,
            video_id=index + 1,
            frame_id=number,
            **frame.facts,
        )
        write_jpeg(folder / entry['file_name'], frame.picture)
        images.append(entry)
        for place, (instance, row, visible) in enumerate(frame.digits):
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=entry['id'],
                    video_id=index + 1,
                    instance_id=instance + 1,
                    category_id=int(sources.labels[row]) + 1,
                    iscrowd=int(visible < MIN_VISIBLE),
                    sample=row,
                    visible=visible,
                    **outline(frame.owner == place),
                )
            )
        pictures.append(frame.picture)
    if stamp['mp4']:
        _write_mp4(folder / f'{name}.mp4', pictures)
    entry = dict(id=index + 1, name=name, width=size, height=size, fps=FPS, length=len(pictures))
    content['videos'].append(dict(entry, **facts))


def _write_mp4(path, pictures):
    from .writer import VideoWriter  # here, since it needs PyAV

    with VideoWriter(path, FPS) as writer:
        for picture in pictures:
            writer.write(picture)
