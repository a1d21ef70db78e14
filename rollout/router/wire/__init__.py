"""HTTP/1.1 as bytes: connections of clients and to workers, without a framework between them."""
