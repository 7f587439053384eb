"""The command that serves a model over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trimtab.cli.app import Model, app
from trimtab.cli.printing import tell


@app.command()
def serve(
    model: Model,
    index: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Index folder that this model made; for /v1/search.")
    ] = None,
    pictures: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the indexed pictures, to show what a search finds.")
    ] = None,
    classes: Annotated[
        Path | None, typer.Option(metavar="TXT", help="Class names, one per line; for /v1/classify.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for other machines too.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes any that is free.")] = 8000,
    api_key_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="Environment variable with the key that clients must show.")
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="One more name that a server for this machine alone answers to; repeatable."),
    ] = None,
    root_path: Annotated[str, typer.Option(metavar="PATH", help="Where a proxy has the server, such as /clip.")] = "",
    allow_urls: Annotated[
        bool, typer.Option("--allow-urls", help="Fetch pictures that clients name by a public web address.")
    ] = False,
    max_batch: Annotated[int, typer.Option(help="Items per forward pass.")] = 32,
    max_wait_ms: Annotated[float, typer.Option(help="How long a batch that is not full waits for more.")] = 2.0,
    queue: Annotated[int, typer.Option(help="Items in work at once; more get 429.")] = 4096,
    max_inputs: Annotated[int, typer.Option(help="Items of one call; more get 422.")] = 2048,
    max_body_mib: Annotated[float, typer.Option(help="Size of one request; more gets 413.")] = 32.0,
    max_megapixels: Annotated[float, typer.Option(help="Size of one picture.")] = 40.0,
    timeout: Annotated[float, typer.Option(help="Seconds until a request gets 504.")] = 30.0,
    connections: Annotated[int, typer.Option(help="Open at once; more get 503.")] = 512,
    device: Annotated[str, typer.Option(help="'auto' takes a GPU where there is one; or a torch device.")] = "auto",
) -> None:
    """Serve embeddings, labels and search over HTTP, with a web page."""
    from trimtab.serve.http.options import ServeOptions

    options = ServeOptions(
        max_batch=max_batch,
        max_wait_ms=max_wait_ms,
        queue=queue,
        timeout=timeout,
        max_body_mib=max_body_mib,
        max_inputs=max_inputs,
        max_megapixels=max_megapixels,
        connections=connections,
        allow_urls=allow_urls,
    )
    from trimtab.serve.http.run import serve as run

    run(
        model,
        index=index,
        pictures=pictures,
        classes=classes,
        host=host,
        port=port,
        api_key_env=api_key_env,
        allow_hosts=allow_host or (),
        root_path=root_path,
        options=options,
        device=device,
        tell=tell,
    )
