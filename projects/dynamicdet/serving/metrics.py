"""What a server tells Prometheus."""

from collections.abc import Callable

from ..errors import import_optional

#: Pictures of a pass, and seconds: edges of the histograms.
_BATCHES = (1, 2, 4, 8, 16, 32, 64)
_SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5, 10)


class Metrics:
    """Counters of one server, by themselves: several may be in a process."""

    def __init__(self) -> None:
        import_optional('prometheus_client', 'servers', 'serve')
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry = CollectorRegistry()
        about = dict(registry=self.registry, namespace='dynamicdet')
        self._queue = Gauge('queue', 'Pictures that wait, before a pass', ['pass'], **about)
        self._batches = Histogram(
            'batch_size', 'Pictures of a pass', ['pass'], buckets=_BATCHES, **about
        )
        self._passes = Histogram(
            'pass_seconds', 'Seconds of a pass', ['pass'], buckets=_SECONDS, **about
        )
        self._latency = Histogram(
            'latency_seconds', 'From arrival to answer', ['exit'], buckets=_SECONDS, **about
        )
        self._threshold = Gauge('threshold', 'Hard above this difficulty', **about)
        self._aim = Gauge('hard_share_aim', 'Hard share that the controller aims at', **about)
        self._share = Gauge('hard_share', 'Of the last pictures, forgotten over 256', **about)
        self._requests = Counter('requests', 'Requests to detect, by status', ['status'], **about)
        self._here = Gauge('pictures', 'Accepted and not yet answered', **about)
        self._share_known = False

    def watch(self, count: Callable[[], int]) -> None:
        """Ask this, whenever the page is read, how many pictures are here."""
        self._here.set_function(count)

    def passed(self, what: str, seconds: float, images: int) -> None:
        """A pass has run: 'first' or 'later'."""
        self._batches.labels(what).observe(images)
        self._passes.labels(what).observe(seconds)

    def answered(self, exit: int, seconds: float) -> None:
        """A picture has its boxes."""
        self._latency.labels(str(exit)).observe(seconds)
        before = self.hard_share
        kept = 1 - 1 / 256 if self._share_known else 0.0
        self._share.set(kept * before + (1 - kept) * (exit > 0))
        self._share_known = True

    def show(self, first: int, later: int, threshold: float, aim: float | None) -> None:
        """What waits now, and the controller's state."""
        self._queue.labels('first').set(first)
        self._queue.labels('later').set(later)
        self._threshold.set(threshold)
        if aim is not None:
            self._aim.set(aim)

    def requested(self, status: int) -> None:
        """A request has its answer."""
        self._requests.labels(str(status)).inc()

    @property
    def hard_share(self) -> float:
        """As `/metrics` has it."""
        return self.registry.get_sample_value('dynamicdet_hard_share') or 0.0

    def text(self) -> tuple[bytes, str]:
        """The page, and its content type."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self.registry), CONTENT_TYPE_LATEST
