"""The web export: a static page that runs the model in a browser, at every size, also offline. docs/web.md."""
