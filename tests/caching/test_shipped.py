"""Cached functions that travel to other processes: by name where functions do, by value where functions do."""

import asyncio
import copy
import inspect
import json
import os
import pickle
import subprocess
import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest
from caching_under_test import Events
from helpers import REPOSITORY, clean_environment
from shipped_project import APP, LIBRARY, RUN, SEND, ship

from aiokv import AsyncKVStore, Encrypted, NearCache, Zstd, kv_cached
from aiokv.caching.naming import canonical_module, module_of

cloudpickle = pytest.importorskip("cloudpickle", reason="cloudpickle comes with fal: pip install 'aiokv[dev]'")


def run(folder: Path, *arguments: str) -> str:
    """Run Python in a folder; give what it prints."""
    paths = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    environment = {**clean_environment(folder), "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ship a program as fal does, and then move its sources elsewhere; give the folder of both."""
    pytest.importorskip("fal", reason="fal is not installed: pip install 'aiokv[dev]'")
    folder = tmp_path_factory.mktemp("shipped")
    project = folder / "project"
    project.mkdir()
    (folder / "empty").mkdir()
    (project / "lib.py").write_text(LIBRARY.format(url=f"sqlite:///{folder / 'kv.db'}"))
    (project / "app.py").write_text(APP)
    (folder / "send.py").write_text(SEND)
    (folder / "agent.py").write_text(RUN)
    run(project, str(folder / "send.py"), str(folder))
    project.rename(folder / "moved")
    return folder


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize("first", ["local", "runner"])
def test_fal_runner_and_local_script_share_entries(shipped: Path, first: str) -> None:
    for path in shipped.glob("kv.db*"):
        path.unlink()

    def at_home() -> dict[str, list[Any]]:
        return dict(json.loads(run(shipped / "moved", "app.py")))

    def on_runners() -> dict[str, list[Any]]:
        done = [json.loads(run(shipped / "empty", str(shipped / "agent.py"), str(shipped / name))) for name in ("App", "run")]
        # The second runner finds what the first has stored.
        assert {name: of_function[:2] for name, of_function in done[1].items()} == {name: done[0][name][:2] for name in done[1]}
        assert {name for name, of_function in done[1].items() if of_function[2]} == set()
        return dict(done[0])

    one, other = (at_home(), on_runners()) if first == "local" else (on_runners(), at_home())
    assert {name: of_function[:2] for name, of_function in one.items()} == {
        name: of_function[:2] for name, of_function in other.items()
    }
    assert len(one) == 11
    assert all(of_function[2] for of_function in one.values())
    assert {name for name, of_function in other.items() if of_function[2]} == set()
    assert {of_function[1].partition(".")[0] for of_function in one.values()} == {"app", "lib"}


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_imported_program_shares_entries_with_its_runner(shipped: Path) -> None:
    run(shipped / "empty", str(shipped / "agent.py"), str(shipped / "App"))
    imported = json.loads(run(shipped / "moved", "-c", "import app, asyncio, json; print(json.dumps(asyncio.run(app.both())))"))
    assert {name for name, of_function in imported.items() if of_function[2]} == set()


SCRIPT = """
import asyncio, dataclasses, json, multiprocessing, pathlib, pickle, sys
from aiokv import AsyncKVStore, kv_cached

kv = AsyncKVStore("db", url={url!r})


@dataclasses.dataclass
class User:
    name: str


@kv_cached(60, store=kv)
async def greet(user: User) -> User:
    return user


class Service:
    @kv_cached(60, store=kv, ignore="self")
    async def method(self, user: User) -> User:
        return user


def call(cached, user):
    result = asyncio.run(cached(user))
    return repr(result), cached.key(user), cached.info().computations, cached is greet


if __name__ == "__main__":
    {main}
"""

POOLS = """
    with multiprocessing.get_context(sys.argv[1]).Pool(1) as pool:
        children = [pool.apply(call, (cached, User("x"))) for cached in (greet, Service().method)]
    print(json.dumps([children, [call(cached, User("x")) for cached in (greet, Service().method)]]))
"""


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_children_of_multiprocessing_share_entries_with_their_parent(tmp_path: Path, method: str) -> None:
    url = f"sqlite:///{tmp_path / 'kv.db'}"
    (tmp_path / "script.py").write_text(SCRIPT.format(url=url, main=POOLS.strip()))
    children, parents = json.loads(run(tmp_path, "script.py", method))
    assert [of_call[:2] for of_call in children] == [of_call[:2] for of_call in parents]
    assert [of_call[2] for of_call in children] == [1, 1]
    assert [of_call[2] for of_call in parents] == [0, 0]
    assert children[0][1].startswith("script.greet:")
    assert [children[0][3], parents[0][3]] == [True, True]


DUMP = """
    import cloudpickle
    pathlib.Path("pickle").write_bytes(cloudpickle.dumps((greet, Service().method, User("x"), call)))
    print(json.dumps([call(cached, User("x")) for cached in (greet, Service().method)]))
"""
LOAD = """
import asyncio, json, pathlib, pickle, sys
greet, method, user, call = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())
print(json.dumps([call(cached, user) for cached in (greet, method)]))
"""


@pytest.mark.parametrize("how", ["script", "module", "notebook"])
def test_functions_of_main_share_entries_with_the_process_that_they_are_shipped_to(tmp_path: Path, how: str) -> None:
    home, empty = tmp_path / "home", tmp_path / "empty"
    for folder in (home, empty, home / "package"):
        folder.mkdir()
    source = SCRIPT.format(url=f"sqlite:///{tmp_path / 'kv.db'}", main=DUMP.strip())
    (home / "package" / "__init__.py").touch()
    (home / "package" / "script.py").write_text(source)
    arguments = {"script": ["package/script.py"], "module": ["-m", "package.script"], "notebook": ["-c", source]}[how]
    local = json.loads(run(home, *arguments))
    pickled = (home / "pickle").rename(tmp_path / "pickle")
    home.rename(tmp_path / "moved")
    (tmp_path / "worker.py").write_text(LOAD)
    elsewhere = json.loads(run(empty, str(tmp_path / "worker.py"), str(pickled)))
    assert [of_call[:2] for of_call in local] == [of_call[:2] for of_call in elsewhere]
    assert [of_call[2] for of_call in local + elsewhere] == [1, 1, 0, 0]
    prefix = {"script": "script.greet:", "module": "package.script.greet:", "notebook": "__main__.greet:"}[how]
    assert local[0][1].startswith(prefix)


MODULE = """
from __future__ import annotations
import asyncio, decimal
from aiokv import kv_cached, kv_cached_many, NearCache, Encrypted, Zstd

near = NearCache(30)
ONE = decimal.Decimal(1)

@kv_cached(60, store=kv)
async def number(n: int) -> decimal.Decimal:
    return ONE

@kv_cached(60, store=kv, near=near)
async def first(n: int) -> dict[str, int]:
    return {"n": n}

@kv_cached(60, store=kv, near=near, ignore=iter(["word"]))
async def second(n: int, word: str = "") -> int:
    "Count."
    return (await first(n))["n"] + (await third(n))["n"]

@kv_cached(60, store=kv, near=near, codec=[Zstd(min_bytes=1), Encrypted(b"k" * 32)], version=3)
async def third(n: int) -> dict[str, int]:
    assert second
    return {"n": n}

class Service:
    def __init__(self):
        self.itself = self.__hidden

    @kv_cached(60, store=kv, ignore="self")
    async def __hidden(self, n: int) -> int:
        return n

    @kv_cached(60, store=kv, ignore="self", returns=int)
    async def work(self, n: int) -> int:
        return n

    @kv_cached_many(60, store=kv)
    @classmethod
    async def many(cls, ids: list[int]) -> dict[int, int]:
        return dict.fromkeys(ids, 1)
"""


@pytest.fixture
def module(store_by_url: AsyncKVStore) -> Any:
    """Return a module that cannot be imported, so that cloudpickle ships what is in it by value."""
    made = types.ModuleType("not_to_be_imported")
    made.kv = store_by_url  # type: ignore[attr-defined]
    exec(MODULE, vars(made))
    return made


@pytest.fixture
def store_by_url(tmp_path: Path) -> AsyncKVStore:
    return AsyncKVStore("db", url=f"sqlite:///{tmp_path / 'kv.db'}")


async def test_near_cache_arrives_empty_and_shared_by_those_that_shared_it(module: Any) -> None:
    await module.first(1)
    first, third, near = ship((module.first, module.third, module.near))
    assert (near.size_bytes, near.ttl_seconds) == (0, 30)
    assert first._cache.near.near is third._cache.near.near is near is not module.near
    assert [await first(1), await first(1), await third(1)] == [{"n": 1}] * 3
    assert (first.info().near_hits, len(near.slots)) == (1, 2)


async def test_key_version_codecs_and_ignored_parameters_travel(module: Any) -> None:
    for name in ("first", "second", "third"):
        cached, shipped = getattr(module, name), ship(getattr(module, name))
        assert shipped is not cached
        assert shipped.key(7) == cached.key(7)
        await cached(7)
        assert await shipped(7) == await cached(7)
        assert shipped.info().computations == 0
    shipped = ship(module.second)
    assert shipped.key(1, "a") == shipped.key(1, "b")
    assert await ship(shipped)(7) == 14


async def test_return_type_travels_where_its_annotation_is_text_that_the_code_does_not_use(module: Any) -> None:
    shipped = ship(module.number)
    assert "decimal" not in shipped.__wrapped__.__globals__
    assert [await shipped(1), await shipped(1), await module.number(1)] == [module.ONE] * 3
    assert (shipped.info().computations, module.number.info().computations) == (1, 0)


def test_shipped_function_looks_like_the_function_before_its_first_call(module: Any) -> None:
    module.second.told = "by the program"
    shipped = ship(module.second)
    assert (shipped.__name__, shipped.__module__, shipped.__doc__) == ("second", "not_to_be_imported", "Count.")
    assert shipped.told == "by the program"
    with pytest.raises(AttributeError):
        # Without `__getattr__`, which would build it.
        object.__getattribute__(shipped, "_cache")
    assert inspect.signature(shipped) == inspect.signature(module.second)
    assert asyncio.iscoroutinefunction(shipped)
    assert inspect.iscoroutinefunction(shipped)
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        shipped.nothing_of_that_name  # noqa: B018


def test_functions_that_call_each_other_stay_together(module: Any) -> None:
    first, second, again = ship((module.first, module.second, module.second))
    assert second is again
    assert second.__wrapped__.__globals__["first"] is first
    third = second.__wrapped__.__globals__["third"]
    assert third.__wrapped__.__globals__["second"] is second
    function = ship(module.second.__wrapped__)
    assert function.__globals__["third"].__wrapped__.__globals__["second"].__wrapped__ is function


async def test_methods_travel_with_their_class(module: Any) -> None:
    service, work, many = ship((module.Service(), module.Service().work, module.Service.many))
    assert type(service) is not module.Service
    assert [await service.work(1), await work(1), await many([1])] == [1, 1, {1: 1}]
    assert service.work.key(1) == module.Service().work.key(1)
    assert many.key(1) == module.Service.many.key(1)
    assert hash(work) != hash(service.work) == hash(service.work)


def test_private_method_travels_bound_to_the_instance_that_holds_it(module: Any) -> None:
    service = ship(module.Service())
    assert service.itself._bound == (service,)
    bound = ship(module.Service().itself)
    assert bound._bound[0].itself._bound[0] is bound._bound[0]


async def test_function_travels_while_a_call_is_under_way(store_by_url: AsyncKVStore) -> None:
    @kv_cached(60, store=store_by_url, key=lambda: "one", near=NearCache(30))
    async def compute() -> int:
        await asyncio.sleep(0)
        return 1

    calls = [asyncio.ensure_future(compute()) for _ in range(3)]
    await asyncio.sleep(0)
    shipped = ship(compute)
    assert await asyncio.gather(*calls) == [1, 1, 1]
    assert (shipped.info().joined, await shipped(), shipped.info().computations) == (0, 1, 0)


async def test_observer_and_functions_among_the_options_travel_as_they_are(store_by_url: AsyncKVStore) -> None:
    @kv_cached(
        lambda n: n + 60,
        store=lambda: store_by_url,
        key=lambda n: n,
        vary=lambda _: "v",
        when=lambda n: n != 2,
        observer=Events(),
    )
    async def compute(n: int) -> int:
        return n

    shipped = ship(compute)
    assert [await shipped(1), await shipped(2)] == [1, 2]
    assert (await compute.peek(1) is None, await compute.peek(2) is None) == (False, True)
    assert shipped._cache.options.observer.count("computed") == 2
    assert compute.info().computations == 0


def test_threads_that_complete_a_shipped_function_at_once_complete_one(module: Any, hurried_threads: None) -> None:  # noqa: ARG001
    for _ in range(20):
        shipped = ship(module.first)
        start = threading.Barrier(4)
        caches: list[object] = []

        def complete(shipped: Any = shipped, start: threading.Barrier = start, caches: list[object] = caches) -> None:
            start.wait()
            caches.append(shipped._cache)

        threads = [threading.Thread(target=complete) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(caches) == 4
        assert len(set(map(id, caches))) == 1


HOOKED = """
import pickle, sys, threading

import cloudpickle

from aiokv import AsyncKVStore, kv_cached
from aiokv.caching import binding

kv = AsyncKVStore("db", url="memory://")


@kv_cached(60, store=kv)
async def compute(n: int) -> int:
    return n


def hook(event, arguments):
    # Other threads have their turn here.
    return event


sent = cloudpickle.dumps(compute)
binding._at_home.clear()
shipped_form = binding._forms_of(type(compute)._kind).shipped
# Should a reference be given up that nobody took, the class does not go away under the test.
kept = [shipped_form] * 10_000
before = sys.getrefcount(shipped_form)
sys.addaudithook(hook)
sys.setswitchinterval(1e-6)
for _ in range(200):
    shipped = pickle.loads(sent)
    start = threading.Barrier(4)

    def complete():
        start.wait()
        shipped._cache

    threads = [threading.Thread(target=complete) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert type(shipped) is type(compute)
    del shipped
print(sys.getrefcount(shipped_form) - before)
"""


@pytest.mark.slow
def test_threads_that_complete_a_shipped_function_beside_an_audit_hook_leave_its_class_alive(tmp_path: Path) -> None:
    # In a process of its own: an audit hook stays.
    assert run(tmp_path, "-c", HOOKED) == "0\n"


def test_what_comes_back_home_is_what_was_sent(module: Any) -> None:
    service, method, many = module.Service(), module.Service.__dict__["work"], module.Service.many
    sent = (module.second, module.first.__wrapped__, service, service.work, many)
    # There and back, and within one process: its classes, too, keep the functions that they had.
    for pickled in (cloudpickle.dumps(sent), cloudpickle.dumps(ship(sent))):
        second, _, came_back, work, many_again = pickle.loads(pickled)
        assert second is module.second
        assert (work._stand_in, many_again) == (service.work._stand_in, many)
        assert type(came_back).__dict__["work"] is method


@kv_cached(60, store=AsyncKVStore("db", url="memory://shipped"))
async def by_name(n: int) -> int:
    return n


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_function_whose_name_leads_to_it_is_pickled_by_name(protocol: int) -> None:
    pickled = pickle.dumps(by_name, protocol)
    assert pickle.loads(pickled) is by_name
    assert len(pickled) < 400
    assert pickle.loads(cloudpickle.dumps(by_name)) is by_name


def test_function_whose_name_does_not_lead_to_it_is_not_pickled_by_name(module: Any) -> None:
    with pytest.raises((pickle.PicklingError, ImportError, AttributeError), match="not_to_be_imported"):
        pickle.dumps(module.first)


def test_registered_module_is_shipped_by_value() -> None:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    try:
        shipped = ship(by_name)
    finally:
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    assert shipped is not by_name
    assert shipped.key(1) == by_name.key(1)


def test_copies_of_a_cached_function_are_itself(module: Any) -> None:
    for cached in (by_name, module.first, ship(module.first), module.Service.many):
        assert copy.copy(cached) is cached
        assert copy.deepcopy(cached) == cached
        assert copy.deepcopy({"a": [cached]}) == {"a": [cached]}


def test_deep_copy_of_an_instance_copies_what_its_methods_are_bound_to(module: Any) -> None:
    service = module.Service()
    copied = copy.deepcopy(service)
    assert copied.itself._bound == (copied,)
    assert copied.itself != service.itself


@pytest.mark.parametrize("codec", [Zstd(min_bytes=7), Encrypted([b"a" * 32, b"b" * 32])], ids=["zstd", "encrypted"])
def test_codec_can_be_pickled(codec: Any) -> None:
    again = pickle.loads(pickle.dumps(codec))
    stored = codec.encode(b"x" * 99, b"context")
    assert again.decode(stored, b"context") == b"x" * 99
    assert again.encode(b"x" * 6, b"") is None or isinstance(codec, Encrypted)


def test_class_of_another_main_is_named_after_the_file_of_its_functions() -> None:
    script = {"__name__": "__main__", "__file__": "/elsewhere/package/tool.py"}
    for package, name in ((None, "tool"), ("package", "package.tool")):
        exec("class Foreign:\n    def work(self): ...", {}, found := {})
        kind: Any = found["Foreign"]
        kind.__module__ = "__main__"
        kind.work = types.FunctionType(kind.work.__code__, {**script, "__package__": package})
        assert module_of(kind) == module_of(kind.work) == name


def test_script_is_named_after_its_file_or_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("__main__", "__mp_main__", "<run_path>"):
        script = types.ModuleType(name)
        script.__file__ = "/somewhere/script.py"
        monkeypatch.setitem(sys.modules, name, script)
        assert canonical_module(name) == "script"
