"""The HTTP server over one model: API, web page, and what keeps both up under load and bad input.

In the order of a request: `guards` (limits before anything is read), `app` and `routes`, then `bodies`, `inputs` and
`addresses` (what clients send), `service` (what is answered), `batching` (the one thread that owns the model).
"""
