"""Network edge of the coordinator: devices apply for a plan, beside the blob service.

Messages are bytes of `common/assignment.py` as they are; no stub is generated for them.
"""

import logging
import time
from collections.abc import Callable

import grpc

from proxymoe.common.assignment import (
    APPLY,
    Application,
    Assignment,
    issue_assignment,
    parse_application,
)
from proxymoe.common.certificates import check_device_certificate
from proxymoe.common.errors import BudgetError, ConfigError, ProtocolError
from proxymoe.server.blobs import Refused
from proxymoe.server.enrolment import Registry, Standing

log = logging.getLogger(__name__)

Assign = Callable[[str, Application], Assignment]
"""The assignment of a device, by name; the same as last time, if it applies for the same."""


def plans_handler(
    assign: Assign, caller: Callable[[grpc.ServicerContext], str], signing_key: bytes
) -> grpc.GenericRpcHandler:
    """Answers `APPLY`.

    Args:
        assign: called from several threads.
        caller: see `enrolled_caller`.
        signing_key: of the coordinator, PEM.
    """

    def apply(content: bytes, context: grpc.ServicerContext) -> bytes:
        device = ""
        try:
            device = caller(context)
            assignment = assign(device, parse_application(content))
            return issue_assignment(assignment, signing_key)
        except Refused as refused:
            log.info("application of device %r: %s", device, refused.reason)
            context.abort(refused.code, refused.reason)
        except (ProtocolError, ConfigError, BudgetError) as error:
            log.info("application of device %r: %s", device, error)
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        raise AssertionError("abort raises")

    _, service, method = APPLY.split("/")
    return grpc.method_handlers_generic_handler(
        service, {method: grpc.unary_unary_rpc_method_handler(apply)}
    )


def enrolled_caller(
    registry: Registry, authority: bytes, clock: Callable[[], float] = time.time
) -> Callable[[grpc.ServicerContext], str]:
    """Finds the name of the device that calls; Refused if its key is no longer enrolled.

    A name alone would not do: a device that was revoked still has a certificate, and the name may
    be another machine's by now.

    Args:
        registry: says whether a key is enrolled.
        authority: PEM certificate of the CA.
        clock: unix seconds.
    """

    def caller(context: grpc.ServicerContext) -> str:
        try:
            (pem,) = context.auth_context()["x509_pem_cert"]
            certificate = check_device_certificate(pem, authority, clock())
        except (KeyError, ValueError, ProtocolError) as error:
            raise Refused(grpc.StatusCode.UNAUTHENTICATED, str(error)) from None
        standing = registry.standing(certificate.key)
        if standing is not Standing.ENROLLED:
            reason = f"this device key is {standing}; enrol the device again"
            raise Refused(grpc.StatusCode.PERMISSION_DENIED, reason)
        return certificate.device

    return caller
