"""The wire: requests as pydantic models, responses as msgspec structs. Types and bounds, no behaviour.

Requests need validation with named errors, which pydantic does best; responses are valid by construction and
encoded once a token, which msgspec does fastest.
"""
