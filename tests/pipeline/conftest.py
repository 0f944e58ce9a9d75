from tests.pipeline.fakes import fakes, first, prepared  # noqa: F401 (fixtures)
