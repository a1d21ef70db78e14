"""What a router answers by itself."""

from __future__ import annotations

from engine.errors import SlipstreamError


class NoWorker(SlipstreamError):
    """No worker may be asked now: none is registered, all are dead, or none of them has the weights
    that the fleet serves. The message names each and why."""

    status = 503


class WorkerLost(SlipstreamError):
    """The worker that answered a request is gone, and nobody can go on where it was: what came of
    the reply is all that there is."""

    status = 503


class WorkerLies(SlipstreamError):
    """A worker that is not what its fleet serves: another model, or bytes outside the protocol."""

    status = 409


class NotAWorker(SlipstreamError):
    """A router was asked, by a router, to be its worker: requests would go round, and an update
    would reach one of its servers only. Register its servers themselves."""

    status = 409


class PrivateRoute(SlipstreamError):
    """A route that routers alone ask of their workers: no client's call is passed on to it."""

    status = 404


class UnknownWorker(SlipstreamError):
    """No worker of that id or URL is registered."""

    status = 404


class FanOutFailed(SlipstreamError):
    """A control call that some workers of the fleet did not take; the reply names them."""

    status = 502
