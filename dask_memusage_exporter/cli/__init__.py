"""`dask memusage VERB`: one verb a file."""
import click

@click.group()
def memusage(): ...
