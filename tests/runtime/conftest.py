import contextlib
import resource

import pytest


@pytest.fixture
def small_files():
    """Within, no file grows beyond so many bytes: as a full disk, the system refuses to write (EFBIG for ENOSPC)."""

    @contextlib.contextmanager
    def limited(size):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited
