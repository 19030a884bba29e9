"""The command `workerd`: options, exit statuses, and one line for whatever goes wrong.

Everything that a command needs is imported by that command, so that `workerd submit` starts quickly.
"""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from workerd import __version__, early
from workerd.errors import Exit
from workerd.exits import EPILOG, explain

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from workerd.client import Client

DEFAULT_CONFIG = "/etc/workerd/workerd.toml"
DEFAULT_SOCKET = "/run/workerd.sock"
# as the protocol has them, but refused with what was received
PRIORITY = click.IntRange(0, 255)
SECONDS = click.FloatRange(0, 315_360_000)
TIMES = click.IntRange(1, 1_000_000)

socket_option = click.option(
    "--socket", "socket", metavar="PATH", default=None, help=f"The daemon's socket [default: {DEFAULT_SOCKET}]."
)
config_option = click.option(
    "--config",
    "config_file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    envvar="WORKERD_CONFIG",
    default=DEFAULT_CONFIG,
    help=f"The configuration [default: {DEFAULT_CONFIG}].",
)


@click.group(
    epilog=EPILOG,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--socket",
    "socket",
    metavar="PATH",
    envvar="WORKERD_SOCKET",
    default=DEFAULT_SOCKET,
    help=f"The daemon's socket [default: {DEFAULT_SOCKET}].",
)
@click.version_option(__version__, message="%(prog)s %(version)s")
@click.pass_context
def workerd(context: click.Context, socket: str) -> int:
    """Runs your Python methods as background jobs, in supervised processes, on one host, with no broker."""
    context.obj = socket
    if context.invoked_subcommand != "run":
        early.withdraw()
    if context.invoked_subcommand is None:
        click.echo(context.get_help(), err=True)
        return Exit.USAGE
    return Exit.OK


@workerd.command()
@config_option
@click.option("--daemonize", is_flag=True, help="Detach, for hosts without systemd; returns once it is ready.")
@click.option(
    "--pidfile",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Holds the pid of a detached daemon [default: beside the socket, with its name and .pid].",
)
@click.option(
    "--logfile",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Log of a detached daemon [default: in the folder of the spool, else beside the pidfile].",
)
def run(config_file: Path, *, daemonize: bool, pidfile: Path | None, logfile: Path | None) -> int:
    """Run the daemon, in the foreground by default."""
    if not daemonize:
        for name, value in (("--pidfile", pidfile), ("--logfile", logfile)):
            if value is not None:
                raise click.UsageError(f"{name} is for --daemonize; in the foreground use the shell's means.")
        from workerd import daemon

        return daemon.run(config_file.absolute())
    return _run_detached(config_file, pidfile, logfile)


def _run_detached(config_file: Path, pidfile: Path | None, logfile: Path | None) -> int:
    from workerd import config, daemonize

    settings = config.load(config_file)
    socket = settings.feeder.socket
    pidfile = pidfile.absolute() if pidfile else socket.with_name(f"{socket.stem}.pid")
    folder = settings.spool.path.parent if settings.spool.path else pidfile.parent
    logfile = logfile.absolute() if logfile else folder / f"{socket.stem}.log"

    def start(on_ready: Callable[[], None]) -> int:
        from workerd import daemon  # in the daemon only: its threads must not be forked

        return daemon.run(settings.file, on_ready)

    def announce(pid: int) -> None:
        click.echo(f"workerd runs with pid {pid}, listens on {socket} and logs to {logfile}")

    return daemonize.start(start, pidfile, logfile, announce)


@workerd.command()
@config_option
@click.option("--user", "name", metavar="NAME", help="For root: import the class as this user.")
@click.option("--as-root", is_flag=True, help="For root: import the class as root; its code may do anything then.")
def check(config_file: Path, name: str | None, *, as_root: bool) -> int:
    """Check the configuration and list the targets.

    Imports the class in a process of its own, for root as the user whose service it is: --user, else who owns the
    spool or its folder, else workerd. Exit status 78 when anything is wrong.
    """
    from workerd import check, config
    from workerd.reports import print_targets

    is_root = os.geteuid() == 0
    if name is not None and (as_root or not is_root):
        raise click.UsageError("--user is for root, and without --as-root.")
    settings = config.load(config_file)
    user = None
    if is_root and not as_root:
        user = check.of_service(settings.spool.path) if name is None else check.named(name)
    print_targets(check.inspect(settings, user))
    return Exit.OK


@workerd.command()
@click.argument("target", required=False)
@click.argument("arguments_json", required=False, metavar="[ARGUMENTS_JSON]")
@click.option(
    "--file", "file", metavar="FILE", help="Submit the jobs of this file, one JSON object a line; - is stdin."
)
@click.option("--wait", is_flag=True, help="Wait for the end, and print the result.")
@click.option("--id", metavar="ID", help="An id of your own: submitted again, it is not run again.")
@click.option("--priority", type=PRIORITY, metavar="N", help="From 0, the most urgent, to 255 [default: 100].")
@click.option("--delay", type=SECONDS, metavar="SECONDS", help="Not before so many seconds from now.")
@click.option("--timeout", type=SECONDS, metavar="SECONDS", help="How long it may run; 0 is for ever.")
@click.option("--max-attempts", type=TIMES, metavar="N", help="How often it is run when it fails [default: 1].")
@click.option("--max-crashes", type=TIMES, metavar="N", help="How many workers it may kill [default: 3].")
@click.option(
    "--reconnect",
    type=click.FloatRange(min=0),
    default=60.0,
    metavar="SECONDS",
    help="With --file: how long a daemon that restarts is waited for [default: 60].",
)
@socket_option
@click.pass_obj
def submit(
    group_socket: str,
    /,
    target: str | None,
    arguments_json: str | None,
    file: str | None,
    socket: str | None,
    reconnect: float,
    *,
    wait: bool,
    **options: Any,
) -> int:
    """Submit a job, or the jobs of a file.

    Prints the id, or with --wait the result; for a file, a summary. ARGUMENTS_JSON is handed to the method, null
    when left out. Defaults of the options can be set in the configuration.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if file is not None:
        if target is not None or given:
            raise click.UsageError("--file takes the jobs, and their options, from the file; give no others.")
        from workerd.submission import submit_file

        return submit_file(socket or group_socket, file, wait=wait, reconnect=reconnect)
    if target is None:
        raise click.UsageError("Give a TARGET, or --file.")
    arguments = None if arguments_json is None else _parse(arguments_json)
    from workerd.submission import submit_one

    return submit_one(socket or group_socket, target, arguments, given, wait=wait)


def _parse(text: str) -> Any:
    import msgspec

    try:
        msgspec.json.decode(text)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        hint = """text needs quotes of its own, as '"text"', and an object the shell's, as '{"key": 1}'"""
        raise click.UsageError(f"ARGUMENTS_JSON is not JSON: {error}; {hint}.") from None
    return msgspec.Raw(text.encode())  # as it was written: a large number keeps all its digits


@workerd.command()
@click.option("--json", "as_json", is_flag=True, help="Print what the daemon answers, for programs.")
@socket_option
@click.pass_obj
def status(group_socket: str, /, socket: str | None, *, as_json: bool) -> int:
    """Show what daemon, workers and jobs are doing."""
    from workerd.reports import print_json, print_status

    with _client(socket or group_socket) as client:
        answer = client.command("status")
    if as_json:
        print_json(answer)
    else:
        print_status(answer)
    return Exit.OK


@workerd.command()
@click.argument("ids", nargs=-1, metavar="[ID]...")
@click.option("--retry", "action", flag_value="retry", help="Run these jobs again, with all their attempts.")
@click.option("--delete", "action", flag_value="delete", help="Forget these jobs.")
@click.option("--all", "everything", is_flag=True, help="With --retry or --delete: every dead job.")
@click.option("--target", metavar="TARGET", help="Only the dead jobs of this target.")
@click.option(
    "--limit", type=click.IntRange(min=0), default=100, metavar="N", help="List so many; 0 is all [default: 100]."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, for programs.")
@socket_option
@click.pass_obj
def dead(
    group_socket: str,
    /,
    ids: tuple[str, ...],
    action: Literal["retry", "delete"] | None,
    target: str | None,
    limit: int,
    socket: str | None,
    *,
    everything: bool,
    as_json: bool,
) -> int:
    """List, retry or delete jobs that failed for good.

    With IDs it shows each with its traceback. With --retry or --delete it acts on the IDs, or on those of a
    --target, or on --all.
    """
    chosen = (bool(ids), everything, target is not None)
    if action and sum(chosen) != 1:
        raise click.UsageError(f"--{action} needs one of: ID..., --target TARGET, --all.")
    if not action and (everything or (ids and target)):
        raise click.UsageError("--all is for --retry and --delete, --target for lists; without them give IDs only.")
    from workerd.reports import act_on_dead, print_dead, show_dead

    with _client(socket or group_socket) as client:
        if action:
            others: dict[str, Any] = {"all": True} if everything else {"target": target}
            return act_on_dead(client, action, [{"id": job_id} for job_id in ids] or [others])
        if ids:
            return show_dead(client, ids, as_json=as_json)
        print_dead(client, target, limit, as_json=as_json)
    return Exit.OK


@workerd.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--dead", is_flag=True, help="The dead jobs, in place of those that have not ended.")
def export(file: Path, *, dead: bool) -> int:
    """Print the jobs in a spool's FILE, one a line, as `submit --file` takes them.

    For a file that no daemon uses: a damaged one that was put aside, one of an older version, a backup. Each job
    has its id, so that none is run twice which the daemon still knows. Exit status 1 when something could not be
    read.
    """
    from workerd.export import export

    return export(file, dead=dead)


def _client(socket: str) -> Client:
    from workerd.client import Client

    return Client(socket)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry of the console script; always ends by SystemExit."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that lacks a character is no reason to fail
    try:
        try:
            exit_status = int(workerd.main(args=arguments, prog_name="workerd", standalone_mode=False) or 0)
            sys.stdout.flush()
        except BaseException as error:
            exit_status = explain(error)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        exit_status = Exit.FAILED
    except OSError as error:
        exit_status = explain(error)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(exit_status)
