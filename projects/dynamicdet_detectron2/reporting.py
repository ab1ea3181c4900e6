"""From a record of a Detectron2 detector to pages, with plain detectors beside it."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from dynamicdet.errors import UsageError
from dynamicdet.files import write_atomically
from dynamicdet.progress import progress
from dynamicdet.reports.figures import png, trade_off_figure
from dynamicdet.reports.routing_analysis import analyze_routing, format_analysis, write_analysis
from dynamicdet.routing.evaluation import read_truth
from dynamicdet.routing.record import RoutingRecord, read_record, write_record

from .building import load_plain
from .data import every_test_image
from .measuring import record_plain


def run_baselines(
    given: Sequence[Sequence[str]] | None, record: RoutingRecord, dataset: str, folder: str | Path
) -> dict[str, RoutingRecord]:
    """Records of plain detectors on a record's data, by name.

    Args:
        given (Sequence): Of each, a yaml config and a checkpoint; None counts as none.
        record (RoutingRecord): Of the dynamic detector.
        dataset (str): The recorded data's name.
        folder (str or Path): Each is kept beside it, so that it runs once.

    Raises:
        UsageError: If a word is missing or too many, a file does not fit, or data differ.
    """
    records: dict[str, RoutingRecord] = {}
    for words in given or ():
        if len(words) != 2:
            raise UsageError('--baseline takes CONFIG CHECKPOINT')
        config, checkpoint = words
        name = Path(config).stem
        if name in records:
            raise UsageError(f"--baseline names '{name}' twice: configs need names of their own")
        cfg, model = load_plain(config, checkpoint)
        facts = (Path(checkpoint).read_bytes(), str(cfg).encode(), dataset.encode())
        digest = hashlib.sha256(b''.join(hashlib.sha256(fact).digest() for fact in facts))
        kept = Path(f'{folder}_baselines') / f'{name}-{digest.hexdigest()[:12]}.npz'
        if kept.is_file():
            records[name] = read_record(kept)
        else:
            batches = every_test_image(cfg, dataset)
            records[name] = record_plain(model, batches, dataset, progress)
            write_record(records[name], kept)
    return records


def publish(
    record: RoutingRecord,
    out_dir: str | Path,
    bootstrap: int,
    calibration: Sequence[float] = (),
    baselines: Mapping[str, RoutingRecord] | None = None,
    validation: tuple | None = None,
) -> Path:
    """Analyze a record of two exits; print the tables; write the page, ``routing.json`` and
    ``trade_off.png``. Arguments as `analyze_routing`'s.

    Returns:
        Path: The page.
    """
    if bootstrap < 0:
        raise UsageError('--bootstrap must be 0 or more')
    path = str(record.provenance.get('ann_file', ''))
    if not Path(path).is_file():
        raise UsageError(f"there is no annotation file '{path}', which the record is of")
    truth = read_truth(path, record.provenance.get('categories') or None)
    analysis = analyze_routing(
        record, truth, validation, bootstrap=bootstrap, calibration=calibration, baselines=baselines
    )
    figure = trade_off_figure(analysis['rows'], analysis['baselines']['points'])
    write_atomically(png(figure), Path(out_dir) / 'trade_off.png')
    page = write_analysis(record, truth, analysis, out_dir)
    print(format_analysis(analysis))
    print(f'\nThe same with pictures: {page}')
    return page
