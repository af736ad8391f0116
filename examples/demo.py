"""Start `aiokv serve` on a free port with a SQLite file, run the quickstart against it, and then show `kv_cached`."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        serve = [sys.executable, "-m", "aiokv", "serve", "--port", "0", "--store", f"sqlite:///{folder}/kv.db"]
        with subprocess.Popen(serve, stderr=subprocess.PIPE, text=True) as server:  # noqa: S603 (our own command)
            try:
                announced = server.stderr.readline().strip() if server.stderr else ""
                print(announced, flush=True)
                if " at " not in announced:
                    print(server.stderr.read() if server.stderr else "", file=sys.stderr)
                    return 1
                address = announced.split(" at ", 1)[1].split(",")[0]
                quickstart = Path(__file__).with_name("quickstart.py")
                environment = {**os.environ, "AIOKV_URL": address}
                environment.pop("AIOKV_KEY", None)
                status = subprocess.run([sys.executable, quickstart], env=environment, check=False).returncode  # noqa: S603
            finally:
                server.terminate()
        print(f"server stopped; its file held {(Path(folder) / 'kv.db').stat().st_size:,} bytes")
    if status == 0:
        print("\nkv_cached:", flush=True)
        status = subprocess.run([sys.executable, Path(__file__).with_name("caching_demo.py")], check=False).returncode  # noqa: S603
    print("\nThe same code runs on fal's service without AIOKV_URL, and on a file with AIOKV_URL=sqlite:///kv.db")
    return status


if __name__ == "__main__":
    sys.exit(main())
