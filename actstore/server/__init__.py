"""The service: a store's queries over HTTP, and the page that shows them.

`app.create_app` makes the ASGI application, `actstore serve` runs it. A request's way: `app` checks
host and token, `routes` finds the store on the `shelf`, `browse` reads tokens and texts,
`parameters` makes a question of the query string, and `answers` gets its answer: out of the
`cache`, in this process where sketches know it, else by a worker process of `jobs`.
"""
