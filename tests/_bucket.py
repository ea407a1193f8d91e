"""A bucket of Google's on this machine: python _bucket.py PORT.

It says what tensorstore asks for, the generation of what it sends.
"""

import sys
import threading

from gcp_storage_emulator.handlers import objects

_download = objects.download


def download(request, response, storage, *arguments, **options):
  _download(request, response, storage, *arguments, **options)
  names = request.params['bucket_name'], request.params['object_id']
  if int(response.status) < 300:
    stored = storage.get_file_obj(*names)
    response['x-goog-generation'] = str(stored['generation'])


objects.download = download

from gcp_storage_emulator import server  # noqa: E402

if __name__ == '__main__':
  port = int(sys.argv[1])
  server.create_server(
      'localhost', port, in_memory=True, default_bucket='bucket'
  ).start()
  print('ready', flush=True)
  threading.Event().wait()
