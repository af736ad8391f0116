"""The options of `aiokv serve`: where each may stand, which counts, and what is refused."""

import argparse
import os
from pathlib import Path

import pytest

from aiokv.errors import ConfigurationError
from aiokv.server.announce import reload_line
from aiokv.server.options import (
    ServerOptions,
    add_flags,
    changed_keys,
    check_exposure,
    check_reload,
    nearest_flag,
    resolve_options,
    unknown_variables,
)

MIB = 1024 * 1024


def parse(*arguments: str) -> dict[str, object]:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_flags(parser)
    return vars(parser.parse_args(arguments))


def from_file(path: Path, text: str, *arguments: str, **environment: str) -> ServerOptions:
    path.write_text(text)
    return resolve_options(parse("--config", str(path), *arguments), environment)


def test_nothing_said_leaves_every_default() -> None:
    assert resolve_options(parse(), {}) == ServerOptions()


def test_flag_counts_before_environment_and_environment_before_file(tmp_path: Path) -> None:
    text = "max-connections = 1\nworkers = 2\ndrain = 3"
    variables = {"AIOKV_SERVE_MAX_CONNECTIONS": "10", "AIOKV_SERVE_WORKERS": "20"}
    options = from_file(tmp_path / "kv.toml", text, "--max-connections", "100", **variables)
    assert (options.max_connections, options.workers, options.drain_seconds) == (100, 20, 3.0)


def test_environment_can_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "kv.toml").write_text("port = 1")
    environment = {"AIOKV_SERVE_CONFIG": str(tmp_path / "kv.toml"), "AIOKV_URL": "memory://"}
    assert resolve_options(parse(), environment).port == 1


def sample_of(name: str) -> str:
    """Return a text for an option that is not its default."""
    kind = str(ServerOptions.__annotations__[name])
    if "bool" in kind:
        return "true"
    if name == "durability":
        return "replicated"
    if "str" in kind:
        return "sample"
    return {"port": "80", "workers": "3", "max_head_bytes": "65536", "max_bytes_in_flight": "5000000"}.get(name, "7")


@pytest.mark.parametrize("name", ServerOptions.__annotations__)
def test_every_option_has_a_flag_a_variable_and_a_key(name: str, tmp_path: Path) -> None:
    text, word = sample_of(name), name.removesuffix("_seconds")
    key = word.replace("_", "-")
    # A key of a certificate needs one, and only stores on Redis have replicas.
    flags = parse(*{"tls_cert": (), "durability": ("--store", "redis://h")}.get(name, ("--tls-cert", "c")))
    (tmp_path / "kv.toml").write_text(f'{key} = "{text}"' if text in {"sample", "replicated"} else f"{key} = {text}")
    by_variable = resolve_options(flags, {f"AIOKV_SERVE_{word.upper()}": text})
    by_key = resolve_options(flags | {"config": str(tmp_path / "kv.toml")}, {})
    by_flag = resolve_options(flags | parse(f"--{key}", *([] if text == "true" else [text])), {})
    assert getattr(by_variable, name) != getattr(ServerOptions, name)
    assert by_variable == by_key == by_flag


def test_flag_can_switch_off_what_the_file_switches_on(tmp_path: Path) -> None:
    assert from_file(tmp_path / "kv.toml", "quick-check = true").quick_check
    assert not from_file(tmp_path / "kv.toml", "quick-check = true", "--no-quick-check").quick_check
    lifted = from_file(tmp_path / "kv.toml", 'max-connections = 5\naccess-file = "f"', "--max-connections", "none")
    assert (lifted.max_connections, lifted.access_file) == (None, "f")
    assert from_file(tmp_path / "kv.toml", 'max-connections = "none"', AIOKV_SERVE_WORKERS="2").max_connections is None


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("64MiB", 64 * MIB),
        ("1.9MB", 1_900_000),
        ("1900000", 1_900_000),
        ("2m", 2_000_000),
        ("3 GB", 3_000_000_000),
        ("2.5KiB", 2560),
        ("7b", 7),
        ("1Ti", 1024**4),
        ("0", 0),
        ("none", None),
    ],
)
def test_sizes_are_read_with_their_units(text: str, size: int | None, tmp_path: Path) -> None:
    assert resolve_options(parse("--max-stored-bytes", text), {}).max_stored_bytes == size
    assert from_file(tmp_path / "kv.toml", f'max-stored-bytes = "{text}"').max_stored_bytes == size


@pytest.mark.parametrize("text", ["", "MB", "1.2.3MB", "1.5", "0.0001k", "1iB", "-1", "1e6", "6_0", "٣", "1PB", "1" * 40])
def test_sizes_that_mean_no_whole_number_of_bytes_are_refused(text: str) -> None:
    with pytest.raises(
        ConfigurationError, match=r"flag --max-stored-bytes: must be a size \(such as 64MiB, 1\.9MB or 4096\) or none, not '"
    ):
        resolve_options(parse(f"--max-stored-bytes={text}"), {})


@pytest.mark.parametrize(
    ("option", "text", "rule"),
    [
        ("workers", "0", "a whole number from 1 to 256, not '0'"),
        ("workers", "1.5", "a whole number from 1 to 256, not '1.5'"),
        ("port", "65536", "a whole number from 0 to 65,535"),
        ("max_connections", "0", "a whole number of at least 1 or none"),
        ("head_timeout", "0", "a number of seconds of at least 0.1 s"),
        ("drain", "nan", "a number of seconds of at least 0 s, not 'nan'"),
        ("drain", "-1", "a number of seconds of at least 0 s, not '-1'"),
        ("max_head_bytes", "100", "a size (such as 64MiB, 1.9MB or 4096) from 8KiB to 1MiB, not '100'"),
        ("max_bytes_in_flight", "1MB", "at least 1.9MB, not '1MB'"),
        ("requests_per_second", "0", "at least 0.001 or none"),
        ("log_keys", "maybe", "true or false, not 'maybe'"),
        ("store", "", "a text that is not empty, not ''"),
        ("head_timeout", "none", "not 'none'; only --tls-cert, --tls-key, "),
        ("tls_cert", "", "a text that is not empty or none"),
    ],
)
def test_impossible_values_are_named_with_their_place_and_rule(option: str, text: str, rule: str) -> None:
    variable = f"AIOKV_SERVE_{option.upper()}"
    with pytest.raises(ConfigurationError) as caught:
        resolve_options(parse(), {variable: text})
    assert str(caught.value).startswith(f"environment, {variable}: must be ")
    assert rule in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max-conections = 1", "key 'max-conections': there is no such option; did you mean max-connections?"),
        ("max_connections = 1", "key 'max_connections': there is no such option; did you mean max-connections?"),
        ("zzz = 1", "`aiokv serve --help` shows all"),
        ("workers = true", "key workers: must be a whole number from 1 to 256, not a value of type bool"),
        ("workers = 1.0", "key workers: must be a whole number from 1 to 256, not 1"),
        ("store = 5", "key store: must be a text that is not empty, not 5"),
        ("quick-check = 1", "key quick-check: must be true or false, not 1"),
        ("workers = 1000000", "from 1 to 256, not 1,000,000"),
        ("host = [1]", "not a value of type list"),
        ("drain = -1", "key drain: must be a number of seconds of at least 0 s, not -1"),
        ("[serve]\nworkers = 1", "options stand at the top of the file, not in the table 'serve'"),
        ("workers = ", "is not TOML"),
        ("workers = 1\nworkers = 2", "is not TOML"),
        (f"x = {'[' * 5000}{']' * 5000}", "kv.toml is not TOML: its values are nested too deeply"),
        (f"grace = 1{'0' * 5000}", "kv.toml is not TOML: a whole number has too many digits"),
        (f"grace = 1{'0' * 400}", "key grace: must be a number of seconds of at least 0.1 s, not a number of 1329 bits"),
        (f"port = -1{'0' * 400}", "key port: must be a whole number from 0 to 65,535, not a number of 1329 bits"),
        (f"max-connections = 0x{'f' * 50_000}", "of at least 1 or none, not a number of 200000 bits"),
        ("max-connections = 9223372036854775808", "of at least 1 or none, not a number of 64 bits"),
        ('max-stored-bytes = "9000000TiB"', "key max-stored-bytes: must be a size"),
    ],
)
def test_wrong_files_are_named_with_the_key(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        from_file(tmp_path / "kv.toml", text)
    assert words in str(caught.value)
    assert "kv.toml" in str(caught.value)


def test_unknown_variables_are_warned_of_and_ignored() -> None:
    environment = {
        "AIOKV_SERVE_DRIAN": "secret",
        "AIOKV_SERVE_UNLIKE_ANYTHING_QQQQQQQQQQ": "1",
        "AIOKV_SERVE_CONFIG": "f",
        "AIOKV_SERVE_WORKERS": "1",
        "AIOKV_URL": "memory://",
    }
    first, second = unknown_variables(environment)
    assert first.startswith("environment, 'AIOKV_SERVE_DRIAN': there is no such option")
    assert first.endswith("did you mean AIOKV_SERVE_DRAIN?")
    assert "secret" not in first
    assert second.endswith("`aiokv serve --help` shows all")
    assert resolve_options(parse(), {"AIOKV_SERVE_DRIAN": "1", "AIOKV_SERVE_SERVICE_HOST": "10.0.0.1"}) == ServerOptions()


def test_address_that_kubernetes_sets_for_the_port_is_refused_with_the_cause() -> None:
    with pytest.raises(ConfigurationError, match=r"AIOKV_SERVE_PORT: must be a port, .* Kubernetes .* `enableServiceLinks"):
        resolve_options(parse(), {"AIOKV_SERVE_PORT": "tcp://10.0.0.1:8787"})


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"absent\.toml cannot be read: No such file"):
        resolve_options(parse("--config", str(tmp_path / "absent.toml")), {})
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigurationError, match="pipe cannot be read: it must be a regular file"):
        resolve_options(parse("--config", str(tmp_path / "pipe")), {})
    (tmp_path / "kv.toml").write_bytes(b"\xff")
    with pytest.raises(ConfigurationError, match="is not TOML: it is not UTF-8"):
        resolve_options(parse("--config", str(tmp_path / "kv.toml")), {})


def test_store_in_a_wrong_option_is_not_repeated() -> None:
    with pytest.raises(ConfigurationError) as caught:
        resolve_options({"store": "memory://secret\0"}, {})
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("store", ["memory://", "MEMORY://name"])
def test_memory_is_not_served_by_several_workers(store: str) -> None:
    with pytest.raises(ConfigurationError, match=r"keeps its values in one process.*--workers 1"):
        resolve_options(parse("--workers", "2", "--store", store), {})


def test_key_of_no_certificate_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="--tls-key needs --tls-cert"):
        resolve_options(parse("--tls-key", "k"), {})


def test_other_machines_need_keys_and_encryption_or_a_word_for_plain_http() -> None:
    with pytest.raises(ConfigurationError, match=r"binds to loopback only, not to '0\.0\.0\.0'"):
        check_exposure(ServerOptions(insecure_http=True), ["127.0.0.1", "0.0.0.0"])
    with pytest.raises(ConfigurationError, match="--insecure-http"):
        check_exposure(ServerOptions(access_file="f"), ["::"])
    assert "trusted" in (check_exposure(ServerOptions(access_file="f", insecure_http=True), ["10.0.0.1"]) or "")
    assert check_exposure(ServerOptions(access_file="f", tls_cert="c"), ["10.0.0.1"]) is None
    assert check_exposure(ServerOptions(), ["127.0.0.1", "::1", "localhost"]) is None


def test_flag_that_does_not_exist_brings_up_the_one_that_it_is_like() -> None:
    assert nearest_flag("--min-free=5M") == "--min-free-bytes"
    assert nearest_flag("--max-conections") == "--max-connections"
    assert nearest_flag("--zzz") is None
    assert nearest_flag("5M") is None


def test_options_that_differ_are_named_as_in_a_file() -> None:
    before = ServerOptions()
    assert changed_keys(before, before) == []
    assert changed_keys(before, before._replace(drain_seconds=1.0, port=1)) == ["port", "drain"]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (ServerOptions(), "nothing to reload: there is no access file, certificate or log file"),
        (ServerOptions(access_log="-"), "nothing to reload: there is no access file, certificate or log file"),
        (ServerOptions(access_file="f", access_log="l"), "reloaded access file and log file"),
        (ServerOptions(access_file="f", tls_cert="c", access_log="l"), "reloaded access file, certificate and log file"),
    ],
)
def test_reload_names_what_there_is(options: ServerOptions, line: str) -> None:
    assert reload_line(options) == line


def test_help_shows_each_default_with_its_unit() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    help_ = " ".join(parser.format_help().split())
    for words in ("(default: 64MiB)", "(default: 15 s)", "(default: none)", "(default: sqlite:///kv.db)", "(default: no)"):
        assert words in help_
    assert help_.count("(default: ") == len(ServerOptions.__annotations__)


@pytest.mark.parametrize(("name", "key"), [("access_file", "access-file"), ("tls_cert", "tls-cert"), ("tls_key", "tls-key")])
def test_reload_may_change_a_protection_and_not_take_it_away(name: str, key: str) -> None:
    present = ServerOptions(access_file="a", tls_cert="b", tls_key="c")
    check_reload(present, present._replace(**{name: "d"}))
    check_reload(ServerOptions(), present)
    with pytest.raises(ConfigurationError, match=f"^{key} is no longer there; to serve without it needs a restart"):
        check_reload(present, present._replace(**{name: None}))


def test_access_file_of_the_access_commands_counts_where_nothing_else_names_one(tmp_path: Path) -> None:
    environment = {"AIOKV_ACCESS_FILE": "of-access"}
    assert resolve_options(parse(), environment).access_file == "of-access"
    assert resolve_options(parse(), {**environment, "AIOKV_SERVE_ACCESS_FILE": "of-serve"}).access_file == "of-serve"
    assert resolve_options(parse("--access-file", "of-flag"), environment).access_file == "of-flag"
    assert from_file(tmp_path / "kv.toml", 'access-file = "of-file"', **environment).access_file == "of-file"
    assert resolve_options(parse("--access-file", "none"), environment).access_file is None
    assert resolve_options(parse(), {"AIOKV_ACCESS_FILE": ""}).access_file is None
