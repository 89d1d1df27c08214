"""A web app to search in documents, with one embedder for all requests.

python -m examples.web_app
"""
