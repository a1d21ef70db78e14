"""A process of jobs that misbehave, for `rollout.jobs`."""

from __future__ import annotations

import os
import sys
import time

from rollout.jobs.job_loop import Answer, serve_jobs


def start(greeting: bytes) -> Answer:
    """Jobs are words: what to do."""
    if greeting == b"leave":
        os._exit(3)

    def answer(data: bytes) -> bytes:
        match data:
            case b"sleep":
                time.sleep(1000)
            case b"spin":
                while True:
                    pass
            case b"exit":
                os._exit(4)
            case b"raise":
                raise ZeroDivisionError("the cause")
            case b"grow":
                return str(len(bytearray(1 << 40))).encode()
        return greeting + data

    return answer


if __name__ == "__main__":
    serve_jobs(start, sys.argv[1:])
