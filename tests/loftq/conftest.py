"""The models and runs that these tests share lie beside this file, from where the folders below import them."""
