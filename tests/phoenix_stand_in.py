"""A program in the place of Phoenix: takes spans over OTLP and gives them back in the shape of its REST API."""

from __future__ import annotations

import json
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

PROJECTS: dict[str, list[dict]] = {"default": []}


def attributes(entries):
    return {entry.key: getattr(entry.value, entry.value.WhichOneof("value") or "string_value") for entry in entries}


def shown(span):
    told = {key: value for key, value in attributes(span.attributes).items() if isinstance(value, str | int | float)}
    return {
        "name": span.name,
        "span_kind": told.get("openinference.span.kind", "UNKNOWN"),
        "context": {"span_id": span.span_id.hex(), "trace_id": span.trace_id.hex()},
        "parent_id": span.parent_span_id.hex() or None,
        "start_time": span.start_time_unix_nano,
        "attributes": told,
    }


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        request = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
        for resource in request.resource_spans:
            project = attributes(resource.resource.attributes)["openinference.project.name"]
            PROJECTS.setdefault(project, []).extend(shown(span) for scope in resource.scope_spans for span in scope.spans)
        self.answer({})

    def do_GET(self):
        match urlsplit(self.path).path.split("/")[1:]:
            case ["v1", "projects"]:
                self.answer({"data": [{"name": name} for name in PROJECTS]})
            case ["v1", "projects", name, "spans"] if name in PROJECTS:
                self.answer({"data": PROJECTS[name]})
            case _:
                self.send_error(404)

    def answer(self, found):
        body = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


if __name__ == "__main__":
    assert sys.argv[1:] == ["serve"]
    assert os.environ["PHOENIX_TELEMETRY_ENABLED"] == "false"
    ThreadingHTTPServer((os.environ["PHOENIX_HOST"], int(os.environ["PHOENIX_PORT"])), Handler).serve_forever()
