"""Room for thousands of open connections."""

import resource

from rollout.http.file_limit import raise_file_limit


def test_the_soft_limit_of_files_is_raised_towards_the_hard_one() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    low = 512
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (low, hard))
        raise_file_limit()
        raised, same = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert same == hard
        assert raised == (65536 if hard == resource.RLIM_INFINITY else min(65536, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
