"""Small streams, for tests."""

from tinyflux.shards.stream import DataConfig, Stream, open_sources


def config_of(folders, **options):
    return DataConfig(folders, **{"global_batch_size": 8, "micro_batch_size": 2, "seed": 5} | options)


def stream_of(config, **options):
    return Stream(open_sources(config), config, **options)


def take(stream, n):
    return [next(stream) for _ in range(n)]
