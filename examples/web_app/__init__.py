"""Search in your documents: a web app with one embedder for all its requests.

python -m examples.web_app
"""
