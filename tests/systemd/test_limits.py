"""How often systemd starts the service and opens its sockets, before it gives them up."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
from daemon_process import job, wait_until
from systemd.service import CONFIG, UNIT, UNITS, Service

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.systemd, pytest.mark.xdist_group("systemd")]

GIVEN_UP = 240  # seconds that 20 starts may take on a busy machine
RESET = "systemctl reset-failed workerd.service workerd.socket && systemctl start workerd.service"


@pytest.fixture
def service(service: Service) -> Iterator[Service]:
    """The service; its limits are as they were afterwards."""
    yield service
    service.reset()


def given_up(service: Service) -> bool:
    return service.machine.show("workerd.socket", "ActiveState") == "failed" and service.show("ActiveState") == "failed"


def failures(service: Service) -> list[float]:
    """When the unit failed since its last orderly start, in seconds."""
    records = service.records(f"UNIT={UNIT}", "MESSAGE_ID=d9b373ed55a64feb8242e02dbe79a49c")
    return [int(record["__MONOTONIC_TIMESTAMP"]) / 1e6 for record in records]


def test_orderly_stops_use_up_no_limit(service: Service) -> None:
    """Who stops and starts the service, or restarts it, may do so as often as they like."""
    machine = service.machine
    machine.write("/etc/systemd/system/workerd.service.d/limit.conf", "[Unit]\nStartLimitBurst=3\n")
    machine.run("systemctl daemon-reload")
    for _ in range(4):
        machine.run(f"systemctl stop {UNIT} && systemctl start {UNIT}")
        machine.run(f"systemctl restart {UNIT}")
    assert service.work("edition")["result"] == "first"


def test_sockets_may_be_opened_often(service: Service) -> None:
    """Restarts of the sockets use up no limit: systemd's own would be five in ten seconds."""
    service.machine.run(f"systemctl stop {UNIT}")
    for _ in range(12):
        service.machine.run("systemctl restart workerd.socket")
    assert service.work("edition")["result"] == "first"


def test_daemon_that_cannot_start_is_given_up(service: Service) -> None:
    """A daemon that fails at each start is not tried for ever: then its socket is closed, so that clients are told."""
    service.machine.run(f"systemctl stop {UNIT}")
    service.drop_in("ExecStart=\nExecStart=/bin/false")
    service.machine.run(f"systemctl start --no-block {UNIT}")
    wait_until(lambda: given_up(service), "it is given up", GIVEN_UP)
    with pytest.raises(OSError, match="No such file"):
        service.connect()
    service.drop_in("")
    service.machine.run(RESET)
    assert service.work("edition")["result"] == "first"


def test_bad_configuration_while_clients_wait(service: Service) -> None:
    """Clients that wait have it tried again, once a second at most, but not for ever; the line that the unit names
    ends that.
    """
    before = len(failures(service))
    service.machine.run(f"systemctl stop {UNIT}")
    service.machine.write(CONFIG, "[workers]\ncount = -1\n")
    with service.connect():
        wait_until(lambda: given_up(service), "it is given up", GIVEN_UP)
    failed = failures(service)[before:]
    assert len(failed) > 10
    assert min(later - earlier for earlier, later in itertools.pairwise(failed[:-1])) >= 0.9
    service.configure()
    assert RESET in (UNITS / UNIT).read_text()
    service.machine.run(RESET)
    assert service.work("edition")["result"] == "first"


def test_bad_configuration_that_is_mended_while_clients_wait(service: Service) -> None:
    """Clients that came while the configuration was wrong are served once it is right; nobody has to start anything."""
    before = len(failures(service))
    service.machine.run(f"systemctl stop {UNIT}")
    service.machine.write(CONFIG, "[workers]\ncount = -1\n")
    with service.connect() as client:
        client.send(job("edition", reply="result"))
        wait_until(lambda: len(failures(service)) > before + 1, "it has failed twice")
        service.configure()
        assert client.recv()["status"] == "accepted"
        assert client.recv()["result"] == "first"


def test_reload_that_a_restart_overtakes(service: Service) -> None:
    """A restart that comes while a reload is under way is no failure, neither for systemd nor in the journal."""
    before = len(failures(service))
    for _ in range(8):
        service.machine.run(f"systemctl reload --no-block {UNIT}; systemctl restart {UNIT}")
    assert len(failures(service)) == before
    assert service.show("Result") == "success"
    assert service.work("edition")["result"] == "first"
