"""What schemathesis finds with the OpenAPI document that `hiermem serve` publishes, against a tiny model.

    pip install schemathesis        # in an environment of its own: it is no part of .venv
    python tests/torture/api.py --schemathesis PATH/TO/schemathesis --examples 100

A server error, an answer that is not as the document says, or a request against the schema that is taken, is a
failure. One check is left out: that all which fits the schema is taken. There are rules that a schema cannot tell.
"""

from __future__ import annotations

import argparse
import pathlib
import subprocess
import sys
import tempfile

sys.path[:0] = [str(pathlib.Path(__file__).parents[1])]

from torture.served import make_served, served  # noqa: E402

LEFT_OUT = "positive_data_acceptance"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemathesis", default="schemathesis", help="the command")
    parser.add_argument("--examples", type=int, default=50, help="at most, of each operation in each phase")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="torture-") as name:
        log = pathlib.Path(name) / "log.txt"
        with served(make_served(pathlib.Path(name) / "model"), log) as server:
            document = f"http://127.0.0.1:{server.port}/openapi.json"
            options = [f"--max-examples={asked.examples}", f"--seed={asked.seed}", f"--exclude-checks={LEFT_OUT}"]
            options += ["--continue-on-failure", "--request-timeout=120", "--suppress-health-check=all"]
            found = subprocess.run([asked.schemathesis, "run", document, *options], cwd=name)
        print(log.read_text(errors="replace")[-2000:])
    sys.exit(found.returncode)


if __name__ == "__main__":
    main()
