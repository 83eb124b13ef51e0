"""Backend URLs: what right ones mean, and what wrong ones are told. No test here opens a connection."""
from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest

from celery import Celery
from celery.exceptions import ImproperlyConfigured

pytest.importorskip('azure.storage.blob')
pytest.importorskip('azure.identity')

from celery.backends import azureblockblob
from celery.backends.azureblockblob import AzureBlockBlobBackend
from celery.backends.azurestorage.credentials import CREDENTIAL_OPTIONS, CREDENTIALS
from celery.backends.azurestorage.options import SETTINGS
from celery.backends.azurestorage.url import ACCEPTED_FORMS, DEVELOPMENT_KEY, parse_url

HOST = 'https://myaccount.blob.core.windows.net'
EMULATOR = 'http://127.0.0.1:10000/devstoreaccount1'

#: As long as an account's key is, with all that base64 may hold; it opens nothing.
KEY = 'Zm9v/b+r' + 'Ab3dEfGh1j' * 7 + 'xyz01234' + '=='
SAS = 'sv=2022-11-02&ss=b&srt=sco&sp=rwdlac&se=2030-01-01T00:00:00Z&sig=q%2Fe%2BA1%3D'

DEFAULT = 'azureblockblob://DefaultAzureCredential@'
MANAGED = 'azureblockblob://ManagedIdentityCredential@'
BY_KEY = f'azureblockblob://myaccount:{KEY}@'
STRING = 'azureblockblob://AccountName=myaccount'
ENDPOINT = 'azureblockblob://BlobEndpoint='

_default = {'credential': 'DefaultAzureCredential'}
_managed = {'credential': 'ManagedIdentityCredential'}
_key = {'account_name': 'myaccount', 'account_key': KEY}
_emulator = {'account_url': EMULATOR, 'account_name': 'devstoreaccount1', 'account_key': DEVELOPMENT_KEY}

#: URLs and what they mean; the account is `HOST` where nothing else is said.
RIGHT = [
    # A credential
    (DEFAULT + HOST, _default),
    (f'azureblockblob://defaultAZUREcredential@{HOST}', _default),
    (f'AZUREBLOCKBLOB://DefaultAzureCredential@{HOST}', _default),
    (f'{DEFAULT}{HOST}/', _default),
    (f'{DEFAULT}{HOST}?', _default),
    (f'{DEFAULT}myaccount', _default),
    (f'{DEFAULT}myaccount/', _default),
    (f'{DEFAULT}myaccount.blob.core.windows.net', _default),
    (f'{DEFAULT}HTTPS://MyAccount.blob.core.windows.net', _default),
    (f'{DEFAULT}{HOST}:443', {**_default, 'account_url': f'{HOST}:443'}),
    (f'{DEFAULT}https://myaccount-secondary.blob.core.windows.net',
     {**_default, 'account_url': 'https://myaccount-secondary.blob.core.windows.net'}),
    (f'{DEFAULT}myaccount.privatelink.blob.core.windows.net',
     {**_default, 'account_url': 'https://myaccount.privatelink.blob.core.windows.net'}),
    (f'{DEFAULT}myaccount.z20.blob.storage.azure.net',
     {**_default, 'account_url': 'https://myaccount.z20.blob.storage.azure.net'}),
    (f'{DEFAULT}https://results.contoso.com', {**_default, 'account_url': 'https://results.contoso.com'}),
    (f'{DEFAULT}https://myaccount.blob.core.usgovcloudapi.net?authority=login.microsoftonline.us',
     {**_default, 'account_url': 'https://myaccount.blob.core.usgovcloudapi.net',
      'options': {'authority': 'login.microsoftonline.us'}}),
    (f'{DEFAULT}https://myaccount.blob.core.chinacloudapi.cn?authority=https://login.chinacloudapi.cn/',
     {**_default, 'account_url': 'https://myaccount.blob.core.chinacloudapi.cn',
      'options': {'authority': 'https://login.chinacloudapi.cn/'}}),
    (f'{DEFAULT}https://127.0.0.1:10000/devstoreaccount1',
     {**_default, 'account_url': 'https://127.0.0.1:10000/devstoreaccount1'}),
    (f'{DEFAULT}https://[::1]:10000/devstoreaccount1/',
     {**_default, 'account_url': 'https://[::1]:10000/devstoreaccount1'}),
    (f'{DEFAULT}localhost:10000/devstoreaccount1',
     {**_default, 'account_url': 'https://localhost:10000/devstoreaccount1'}),
    (f'{DEFAULT}https://azurite.svc.local:10000/myaccount',
     {**_default, 'account_url': 'https://azurite.svc.local:10000/myaccount'}),
    (f'{DEFAULT}https://azurite.svc.local/devstoreaccount1',
     {**_default, 'account_url': 'https://azurite.svc.local/devstoreaccount1'}),
    # Options of a credential
    (f'{DEFAULT}myaccount?client_id=11111111-2222', {**_default, 'options': {'client_id': '11111111-2222'}}),
    (f'{DEFAULT}myaccount?exclude_cli_credential=True&process_timeout=20',
     {**_default, 'options': {'exclude_cli_credential': True, 'process_timeout': 20}}),
    (f'{DEFAULT}myaccount?disable_instance_discovery=off',
     {**_default, 'options': {'disable_instance_discovery': False}}),
    (f'{DEFAULT}myaccount?authority=https://[::1]:8443', {**_default, 'options': {'authority': 'https://[::1]:8443'}}),
    (f'{MANAGED}{HOST}?client_id=a-1', {**_managed, 'options': {'client_id': 'a-1'}}),
    (f'{MANAGED}{HOST}?object_id=a-1', {**_managed, 'options': {'object_id': 'a-1'}}),
    (f'{MANAGED}{HOST}?resource_id=/subscriptions/1/resourceGroups/a%20(b)/x',
     {**_managed, 'options': {'resource_id': '/subscriptions/1/resourceGroups/a (b)/x'}}),
    (f'{MANAGED}{HOST}?resource_id=%2Fsubscriptions', {**_managed, 'options': {'resource_id': '/subscriptions'}}),
    (f'azureblockblob://WorkloadIdentityCredential@{HOST}?tenant_id=t&client_id=c&token_file_path=/run/token',
     {'credential': 'WorkloadIdentityCredential',
      'options': {'tenant_id': 't', 'client_id': 'c', 'token_file_path': '/run/token'}}),
    (f'azureblockblob://WorkloadIdentityCredential@{HOST}', {'credential': 'WorkloadIdentityCredential'}),
    (f'azureblockblob://EnvironmentCredential@{HOST}', {'credential': 'EnvironmentCredential'}),
    (f'azureblockblob://CertificateCredential@{HOST}?tenant_id=t&client_id=c&certificate_path=C:%5Ccert.pem'
     '&send_certificate_chain=1',
     {'credential': 'CertificateCredential',
      'options': {'tenant_id': 't', 'client_id': 'c', 'certificate_path': 'C:\\cert.pem',
                  'send_certificate_chain': True}}),
    (f'azureblockblob://AzureCliCredential@{HOST}?tenant_id=contoso.onmicrosoft.com&subscription=My%20one',
     {'credential': 'AzureCliCredential',
      'options': {'tenant_id': 'contoso.onmicrosoft.com', 'subscription': 'My one'}}),
    # Settings
    (f'{DEFAULT}{HOST}?container_name=results&base_path=a/b%3F%26+/&read_timeout=1.5&max_concurrency=4',
     {**_default, 'settings': {'container_name': 'results', 'base_path': 'a/b?&+/', 'read_timeout': 1.5,
                               'max_concurrency': 4}}),
    (f'{DEFAULT}{HOST}?client_id=a&container_name=results',
     {**_default, 'options': {'client_id': 'a'}, 'settings': {'container_name': 'results'}}),
    (f'{DEFAULT}{HOST}?base_path=caf%C3%A9@', {**_default, 'settings': {'base_path': 'café@'}}),
    # An account's key
    (BY_KEY + HOST, _key),
    (f'{BY_KEY}myaccount', _key),
    (f'azureblockblob://myaccount:{quote(KEY, safe="")}@{HOST}', _key),
    (f'azureblockblob://myaccount:{quote(KEY)}@{HOST}', _key),
    (f'azureblockblob://myaccount://{KEY[2:]}@{HOST}', {**_key, 'account_key': f'//{KEY[2:]}'}),
    (f'{BY_KEY}{HOST}?base_path=a@b', {**_key, 'settings': {'base_path': 'a@b'}}),
    (f'azureblockblob://devstoreaccount1:{DEVELOPMENT_KEY}@{EMULATOR}', _emulator),
    (f'azureblockblob://devstoreaccount1:{DEVELOPMENT_KEY}@http://azurite:10000/devstoreaccount1',
     {**_emulator, 'account_url': 'http://azurite:10000/devstoreaccount1'}),
    (f'{BY_KEY}http://10.0.0.7/myaccount', {**_key, 'account_url': 'http://10.0.0.7/myaccount'}),
    (f'{BY_KEY}http://azurite.svc.local/myaccount', {**_key, 'account_url': 'http://azurite.svc.local/myaccount'}),
    (f'azureblockblob://BlobEndpoint=http://azurite.svc.local/myaccount;AccountName=myaccount;AccountKey={KEY}',
     {**_key, 'account_url': 'http://azurite.svc.local/myaccount'}),
    # Connection strings
    (f'azureblockblob://DefaultEndpointsProtocol=https;AccountName=myaccount;AccountKey={KEY};'
     'EndpointSuffix=core.windows.net', _key),
    (f'{STRING};AccountKey={KEY}', _key),
    (f'azureblockblob://AccountKey={KEY};AccountName=myaccount;', _key),
    (f'azureblockblob://ACCOUNTNAME=myaccount;accountkey={KEY}', _key),
    (f'azureblockblob:// AccountName = myaccount ; AccountKey = {KEY} ;', _key),
    (f'azureblockblob://;AccountName=myaccount;;AccountKey={KEY}', _key),
    (f'azureblockblob://DefaultEndpointsProtocol=HTTP;AccountName=myaccount;AccountKey={KEY};EndpointSuffix=test.local',
     {**_key, 'account_url': 'http://myaccount.blob.test.local'}),
    (f'azureblockblob://DefaultEndpointsProtocol=http;AccountName=devstoreaccount1;AccountKey={DEVELOPMENT_KEY};'
     f'BlobEndpoint={EMULATOR};QueueEndpoint=http://127.0.0.1:10001/devstoreaccount1', _emulator),
    (f'{ENDPOINT}{HOST}/;QueueEndpoint=https://myaccount.queue.core.windows.net/;SharedAccessSignature={SAS}',
     {'sas': SAS}),
    (f'{ENDPOINT}{HOST};SharedAccessSignature=?{SAS}', {'sas': SAS}),
    (f'azureblockblob://SharedAccessSignature={SAS};BlobEndpoint={HOST}', {'sas': SAS}),
    (f'{ENDPOINT}{HOST}?{SAS}', {'sas': SAS}),
    (f'{ENDPOINT}{HOST}/?{SAS};', {'sas': SAS}),
    (f'{ENDPOINT}myaccount.blob.core.windows.net;SharedAccessSignature={SAS}', {'sas': SAS}),
    (f'{STRING};SharedAccessSignature={SAS}', {'account_name': 'myaccount', 'sas': SAS}),
    ('azureblockblob://UseDevelopmentStorage=true', _emulator),
    ('azureblockblob://usedevelopmentstorage=True;', _emulator),
    ('azureblockblob://UseDevelopmentStorage=true;DevelopmentStorageProxyUri=http://azurite',
     {**_emulator, 'account_url': 'http://azurite:10000/devstoreaccount1'}),
    ('azureblockblob://UseDevelopmentStorage=true;DevelopmentStorageProxyUri=http://azurite:10000/',
     {**_emulator, 'account_url': 'http://azurite:10000/devstoreaccount1'}),
    # What Celery hands over of azureblockblob+https://…, and the whole of it
    (f'https://DefaultAzureCredential@{HOST}', _default),
    ('https://DefaultAzureCredential@myaccount.blob.core.windows.net', _default),
    (f'https://myaccount:{KEY}@myaccount.blob.core.windows.net', _key),
    (f'http://devstoreaccount1:{DEVELOPMENT_KEY}@127.0.0.1:10000/devstoreaccount1', _emulator),
    (f'https://AccountName=myaccount;AccountKey={KEY}', _key),
    ('azureblockblob+https://DefaultAzureCredential@myaccount', _default),
    (f'azureblockblob+https://myaccount:{KEY}@myaccount', _key),
]

#: URLs of an account alone: the identity is the setting azureblockblob_credential.
RIGHT_WITH_SETTING = [
    (f'azureblockblob://{HOST}', {}),
    ('azureblockblob://myaccount', {}),
    ('azureblockblob://myaccount.blob.core.windows.net?container_name=results',
     {'settings': {'container_name': 'results'}}),
    ('azureblockblob://managedidentity', {'account_url': 'https://managedidentity.blob.core.windows.net'}),
    ('azureblockblob://mycredential', {'account_url': 'https://mycredential.blob.core.windows.net'}),
    (ENDPOINT + HOST, {}),
    (STRING, {'account_name': 'myaccount'}),
    ('https://myaccount.blob.core.windows.net', {}),
    ('azureblockblob+https://myaccount.blob.core.windows.net', {}),
]

#: Texts that are wrong in themselves, and what is said of them.
WRONG = [
    # Not the URL of this backend
    (None, 'the URL is missing'),
    ('', 'the URL is missing'),
    (b'azureblockblob://myaccount', 'must be text'),
    (['azureblockblob://myaccount'], 'must be text'),
    ('azureblockblob', 'must begin with azureblockblob://'),
    ('azureblockblob:myaccount', 'must begin with azureblockblob://'),
    ('azureblockblobs://myaccount', 'must begin with azureblockblob://'),
    (f'DefaultAzureCredential@{HOST}', 'must begin with azureblockblob://'),
    (f'"{DEFAULT}{HOST}"', 'must begin with azureblockblob://'),
    ('azureblockblob://', 'nothing follows azureblockblob://'),
    ('azureblockblob://  ', 'white space'),
    (f'{DEFAULT}{HOST}\n', 'white space or control characters'),
    (f'{DEFAULT}{HOST} ', 'white space'),
    (f'azureblockblob:// DefaultAzureCredential@{HOST}', 'white space'),
    (f'{DEFAULT}\u200b{HOST}', 'white space or control characters'),
    (f'azureblockblob://"AccountName=myaccount;AccountKey={KEY}"', 'quotation marks'),
    (f"azureblockblob://'DefaultAzureCredential@{HOST}'", 'quotation marks'),
    # Credentials
    (f'azureblockblob://DefaultAzureCrednetial@{HOST}',
     'DefaultAzureCrednetial is no credential that can be used here: did you mean DefaultAzureCredential?'),
    (f'azureblockblob://DefaultCredential@{HOST}', 'did you mean DefaultAzureCredential?'),
    (f'azureblockblob://MANAGEDIDENTITY@{HOST}', 'did you mean ManagedIdentityCredential?'),
    (f'azureblockblob://managed-identity-credential@{HOST}',
     'what stands before the @ is neither ACCOUNT_NAME:ACCOUNT_KEY nor a credential that can be used here: '
     'did you mean ManagedIdentityCredential?'),
    (f'azureblockblob://WorkloadIdentity@{HOST}', 'did you mean WorkloadIdentityCredential?'),
    (f'azureblockblob://AzureCLICredentials@{HOST}', 'did you mean AzureCliCredential?'),
    (f'azureblockblob://ClientSecretCredential@{HOST}',
     'ClientSecretCredential is no credential that can be used here. These can: DefaultAzureCredential, '),
    (f'azureblockblob://InteractiveBrowserCredential@{HOST}', 'there is the setting azureblockblob_credential'),
    (f'azureblockblob://msi@{HOST}', 'neither ACCOUNT_NAME:ACCOUNT_KEY nor a credential'),
    (f'azureblockblob://@{HOST}', 'neither ACCOUNT_NAME:ACCOUNT_KEY nor a credential'),
    (f'azureblockblob://ManagedIdentityCredential:1111-2222@{HOST}',
     'ManagedIdentityCredential takes no value after a colon. Its options follow a ?: ?client_id='),
    (f'azureblockblob://defaultazurecredential:x@{HOST}', 'follow a ?: ?client_id='),
    (f'azureblockblob://AzureCliCredential:x@{HOST}', 'follow a ?: ?tenant_id='),
    (f'azureblockblob://DefaultAzureCrednetial:x@{HOST}', 'did you mean DefaultAzureCredential?'),
    ('azureblockblob://DefaultAzureCredential', 'DefaultAzureCredential needs an @ and an account URL'),
    ('azureblockblob://defaultazurecredential', 'DefaultAzureCredential needs an @ and an account URL'),
    (f'azureblockblob://DefaultAzureCredential:{HOST}', 'DefaultAzureCredential needs an @'),
    (f'azureblockblob://DefaultAzureCredential%40{HOST}', 'DefaultAzureCredential needs an @'),
    ('azureblockblob://DefaultAzureCredential?client_id=x', 'DefaultAzureCredential needs an @'),
    ('azureblockblob://DefaultAzureCrednetial', 'needs an @ and an account URL after it: did you mean Default'),
    (DEFAULT, 'the account URL is missing'),
    (f'{DEFAULT}?client_id=x', 'the account URL is missing'),
    (f'azureblockblob://{DEFAULT}{HOST}', 'azureblockblob:// stands there twice'),
    (f'azureblockblob://AzureBlockBlob+HTTPS://{HOST}', 'azureblockblob:// stands there twice'),
    (f'{DEFAULT}@{HOST}', 'two identities at once'),
    (f'{DEFAULT}myaccount:{KEY}@{HOST}', 'two identities at once: DefaultAzureCredential and what follows'),
    (f'{DEFAULT}{HOST}@myaccount', 'two identities at once'),
    (f'azureblockblob://{HOST}@DefaultAzureCredential', 'goes before the @, and the account URL after it'),
    ('azureblockblob://myaccount@DefaultAzureCredential', 'goes before the @, and the account URL after it'),
    ('azureblockblob://https://DefaultAzureCredential@myaccount', 'goes before the @, and the account URL after it'),
    (f'{DEFAULT}http://myaccount.blob.core.windows.net', 'sends a token, which Azure takes over https only'),
    (f'http://DefaultAzureCredential@{EMULATOR[7:]}', 'sends a token, which Azure takes over https only'),
    # Keys
    (f'azureblockblob://myaccount@{HOST}', 'neither ACCOUNT_NAME:ACCOUNT_KEY nor a credential'),
    (f'azureblockblob://myaccount:@{HOST}', 'the account key is missing'),
    (f'azureblockblob://myaccount:a2V@{HOST}', 'the account key is not base64. Copy it whole'),
    (f'azureblockblob://myaccount:{KEY}%zz@{HOST}', 'not base64'),
    (f'azureblockblob://myaccount:%FF%FE@{HOST}', 'not base64'),
    (f'azureblockblob://myaccount:a2V5@a2V5@{HOST}', 'not base64'),
    (f'azureblockblob://MyAccount:{KEY}@{HOST}', 'account name before the colon must have 3 to 24 lower-case'),
    (f'azureblockblob://my-account:{KEY}@{HOST}', 'account name before the colon'),
    (f'azureblockblob://my:{KEY}@{HOST}', 'account name before the colon'),
    (f'azureblockblob://:{KEY}@{HOST}', 'account name before the colon'),
    (f'azureblockblob://{KEY}', 'an account key goes between the name of its account and an @'),
    (f'azureblockblob://{KEY}@{HOST}', 'an account key goes between'),
    (f'azureblockblob://{quote(KEY, safe="")}@{HOST}', 'an account key goes between'),
    (f'azureblockblob://{KEY}:myaccount@{HOST}', 'an account key goes between'),
    (f'azureblockblob://myaccount:{KEY}', 'an account key goes between'),
    (f'azureblockblob://myaccount/{KEY}@{HOST}', 'an account key goes between'),
    (f'azureblockblob://{HOST}?{KEY}', 'an account key goes between'),
    (f'{DEFAULT}{HOST}?base_path={KEY}', 'an account key goes between'),
    (f'{DEFAULT}{HOST}?account_key=a2V5', 'an account key goes between'),
    (f'{DEFAULT}{HOST}?AccountKey=a2V5', 'an account key goes between'),
    ('azureblockblob://myaccount:a2V5', 'An account key needs an @ after it'),
    (f'azureblockblob://https://myaccount:a2V5@{HOST[8:]}', 'goes before the @'),
    (f'{BY_KEY}', 'the account URL is missing'),
    # Shared access signatures
    (f'azureblockblob://{HOST}?{SAS}', 'a shared access signature goes into a connection string: BlobEndpoint='),
    (f'{DEFAULT}{HOST}?{SAS}', 'goes into a connection string'),
    (f'{BY_KEY}{HOST}?{SAS}', 'goes into a connection string'),
    (f'azureblockblob://{HOST}/results?{SAS}', 'goes into a connection string'),
    (f'azureblockblob://{SAS}@{HOST}', 'goes into a connection string'),
    (f'azureblockblob://?{SAS}', 'goes into a connection string'),
    (f'azureblockblob://myaccount:{SAS}@{HOST}', 'goes into a connection string'),
    (f'azureblockblob://{HOST};SharedAccessSignature={SAS}', 'goes into a connection string'),
    (f'azureblockblob://{HOST}?{quote(SAS, safe="")}', 'goes into a connection string'),
    (f'azureblockblob://{HOST}?sas_token=x', 'goes into a connection string'),
    # Connection strings
    (f'azureblockblob://AcountName=myaccount;AccountKey={KEY}',
     'AcountName is not a key of a connection string: did you mean AccountName?'),
    (f'azureblockblob://Account-Name=myaccount;AccountKey={KEY}',
     'what stands before the = is not a key of a connection string: did you mean AccountName?'),
    ('azureblockblob://UseDevStorage=true', 'did you mean UseDevelopmentStorage?'),
    (f'azureblockblob://Foo=bar;AccountName=myaccount;AccountKey={KEY}', 'first key here is none that Azure'),
    (f'azureblockblob://{HOST};AccountName=myaccount;AccountKey={KEY}', 'first key here is none'),
    (f'azureblockblob://Endpoint=sb://x.servicebus.windows.net/;SharedAccessKeyName=a;SharedAccessKey={KEY}',
     'a connection string of Service Bus'),
    (f'{STRING};AcountKey={KEY}', 'AcountKey is not a key of a connection string: did you mean AccountKey?'),
    (f'{STRING};Account Key={KEY}', 'what stands before an = is not a key of a connection string: did you mean'),
    (f'{STRING};{KEY}', 'a part that is not a KEY=VALUE which Azure Storage knows'),
    (f'{STRING};AccountKey={KEY};accountkey={KEY}', 'AccountKey is given twice'),
    (f'{STRING};AccountKey=', 'AccountKey is empty'),
    (f'{STRING};AccountKey', 'AccountKey is empty'),
    (f'azureblockblob://AccountName=;AccountKey={KEY}', 'AccountName is empty'),
    (f'{STRING};AccountKey=no', 'not base64'),
    (f'{STRING};AccountKey="{KEY}"', 'not base64'),
    (f'{STRING};AccountKey={quote(KEY, safe="")}', 'not base64'),
    (f'{STRING};AccountKey={KEY[:20]} {KEY[20:]}', 'AccountKey holds white space'),
    (f'{STRING},AccountKey={KEY}', 'AccountName must have 3 to 24 lower-case letters and digits, up to the next ;'),
    (f'azureblockblob://AccountName={KEY};AccountKey=myaccount', 'AccountName must have'),
    (f'azureblockblob://AccountKey={KEY}', 'names no account: it needs AccountName or BlobEndpoint'),
    (f'azureblockblob://SharedAccessSignature={SAS}', 'names no account'),
    ('azureblockblob://UseDevelopmentStorage=false', 'names no account'),
    (f'azureblockblob://AccountKey={KEY};BlobEndpoint={HOST}', 'AccountKey needs AccountName'),
    (f'azureblockblob://DefaultEndpointsProtocol=ftp;AccountName=myaccount;AccountKey={KEY}', 'must be https or'),
    (f'{STRING};AccountKey={KEY};EndpointSuffix=https://core.windows.net', 'EndpointSuffix must be a host name'),
    (f'{STRING};AccountKey={KEY};SharedAccessSignature={SAS}', 'two identities at once'),
    (f'{ENDPOINT}{HOST}?{SAS};AccountName=myaccount;AccountKey={KEY}', 'two identities at once'),
    (f'{ENDPOINT}{HOST}?{SAS};SharedAccessSignature={SAS}', 'two identities at once'),
    (f'{ENDPOINT}{HOST};SharedAccessSignature=sv=2022-11-02&sp=r', 'has no sig='),
    (f'{ENDPOINT}{HOST};SharedAccessSignature={HOST}?{SAS}', 'SharedAccessSignature holds a ?'),
    (f'{ENDPOINT}{HOST}/results?{SAS}', '?container_name=results, or as the setting azureblockblob_container_name'),
    (f'{ENDPOINT}https://me:{KEY}@myaccount.blob.core.windows.net;SharedAccessSignature={SAS}', 'holds an @'),
    (f'{ENDPOINT}ftp://myaccount;SharedAccessSignature={SAS}', 'must begin with https:// or http://'),
    (f'{STRING};AccountKey={KEY};container_name=results', 'container_name is a setting'),
    (f'{STRING};AccountKey={KEY}?container_name=results', 'A connection string takes no options: they are settings'),
    ('azureblockblob://UseDevelopmentStorage=true?container_name=results', 'takes no options: they are settings'),
    ('azureblockblob://UseDevelopmentStorage=true;AccountName=devstoreaccount1', 'goes without AccountName'),
    ('azureblockblob://UseDevelopmentStorage=true;DevelopmentStorageProxyUri=azurite', 'must be http://HOST'),
    # Account URLs
    (f'{DEFAULT}my_account', 'an account name has 3 to 24 lower-case letters and digits'),
    (f'{DEFAULT}MyAccount', 'an account name has 3 to 24 lower-case'),
    (f'{DEFAULT}<account>', 'an account name has 3 to 24 lower-case'),
    (f'{DEFAULT}htps://myaccount.blob.core.windows.net', 'must begin with https:// or http://'),
    (f'{DEFAULT}https:/myaccount.blob.core.windows.net', 'must begin with https:// or http://'),
    (f'{DEFAULT}https//myaccount.blob.core.windows.net', 'must begin with https:// or http://'),
    (f'{DEFAULT}https://', 'no valid host name'),
    (f'{DEFAULT}https://<account>.blob.core.windows.net', 'no valid host name'),
    (f'{DEFAULT}https://my..blob.core.windows.net', 'no valid host name'),
    (f'{DEFAULT}https://mÿaccount.blob.core.windows.net', 'no valid host name'),
    (f'{DEFAULT}https://myaccount\u017f.blob.core.windows.net', 'no valid host name'),
    (f'{DEFAULT}https://my%61ccount.blob.core.windows.net', 'no valid host name'),
    (f'{DEFAULT}{HOST}&client_id=x', 'Options follow a ?'),
    (f'{DEFAULT}{HOST};client_id=x', 'Options follow a ? and are separated by &'),
    (f'{DEFAULT}https://127.1/myaccount', 'no valid host name or address'),
    (f'{DEFAULT}https://[127.0.0.1]/myaccount', 'no valid host name or address'),
    (f'{DEFAULT}https://[::zz]/myaccount', 'no valid host name or address'),
    (f'{DEFAULT}https://::1/myaccount', 'port of the account URL must be a number from 1 to 65535'),
    (f'{DEFAULT}{HOST}:99999', 'from 1 to 65535'),
    (f'{DEFAULT}{HOST}:0', 'from 1 to 65535'),
    (f'{DEFAULT}{HOST}:https', 'from 1 to 65535'),
    (f'{DEFAULT}{HOST}:', 'from 1 to 65535'),
    (f'{DEFAULT}https://127.0.0.1:10000', 'the account name is missing'),
    (f'{DEFAULT}https://localhost/', 'the account name is missing'),
    (f'{DEFAULT}https://myaccount', 'An account of Azure is written https://ACCOUNT.blob.core.windows.net'),
    (f'{DEFAULT}{HOST}/results', 'an account URL holds no container. Write it as the option ?container_name=res'),
    (f'{DEFAULT}myaccount/results/', '?container_name=results,'),
    (f'{BY_KEY}https://blobs.contoso.com:8443/results', '?container_name=results,'),
    (f'{DEFAULT}{HOST}/a_b', '?container_name=CONTAINER,'),
    (f'{DEFAULT}{HOST}/results/more', '?container_name=CONTAINER,'),
    (f'{DEFAULT}{HOST}/devstoreaccount1', '?container_name=devstoreaccount1,'),
    (f'{DEFAULT}https://127.0.0.1:10000/devstoreaccount1/results', '?container_name=results,'),
    (f'{DEFAULT}https://127.0.0.1:10000/dev_store', 'the path of the account URL is no account name'),
    (f'{DEFAULT}{HOST}#results', 'holds an @ or a #'),
    (f'{DEFAULT}https://myaccount.core.windows.net', 'the host is ACCOUNT.blob.core.windows.net'),
    (f'{DEFAULT}https://myaccount.dfs.core.windows.net', 'results are stored in blobs'),
    (f'{DEFAULT}https://myaccount.queue.core.usgovcloudapi.net', 'results are stored in blobs'),
    # Options
    (f'{DEFAULT}{HOST}?clientid=x', 'clientid is not an option: did you mean client_id?'),
    (f'{DEFAULT}{HOST}?Client_ID=x', 'Client_ID is not an option: did you mean client_id?'),
    (f'{DEFAULT}{HOST}?client-id=x', 'what follows the ? is not an option: did you mean client_id?'),
    (f'{DEFAULT}{HOST}?container=results', 'did you mean container_name?'),
    (f'{DEFAULT}{HOST}?azureblockblob_container_name=results', 'did you mean container_name?'),
    (f'{DEFAULT}{HOST}?foo=bar', 'unknown option. Known are: authority, base_path, client_id, '),
    (f'{DEFAULT}{HOST}?=bar', 'an option is missing'),
    (f'{DEFAULT}{HOST}?client_id=x&', 'an option is missing'),
    (f'{DEFAULT}{HOST}?client_id', 'the option client_id is empty'),
    (f'{DEFAULT}{HOST}?client_id=', 'the option client_id is empty'),
    (f'{DEFAULT}{HOST}?client_id=x&client_id=x', 'the option client_id is given twice'),
    (f'{DEFAULT}{HOST}?base_path=a&base_path=b', 'the option base_path is given twice'),
    (f'{DEFAULT}{HOST}?base_path=a?container_name=b', 'a ? stands in the option base_path. Options are separated'),
    (f'{DEFAULT}{HOST}?base_path=%FF', 'percent-encoding of the option base_path is no UTF-8'),
    (f'{DEFAULT}{HOST}?object_id=x', 'DefaultAzureCredential does not take the option object_id. It takes: aut'),
    (f'{MANAGED}{HOST}?tenant_id=x', 'It takes: client_id, object_id, resource_id.'),
    (f'{BY_KEY}{HOST}?client_id=x', 'the option client_id goes with a credential: DefaultAzureCredential or'),
    (f'{DEFAULT}{HOST}?client_secret=x', 'AZURE_CLIENT_SECRET, where EnvironmentCredential reads it'),
    (f'{DEFAULT}{HOST}?client_id=<id>', 'client_id must be an id'),
    (f'{DEFAULT}{HOST}?authority=http://login.microsoftonline.com', 'authority must be a host or an https:// URL'),
    (f'{DEFAULT}{HOST}?authority=AzureUSGovernment', 'an https:// URL, such as login.microsoftonline.us'),
    (f'{DEFAULT}{HOST}?exclude_cli_credential=maybe', 'exclude_cli_credential must be true or false'),
    (f'azureblockblob://AzureCliCredential@{HOST}?subscription=a%2Fb', 'must be the name or the id of a sub'),
    (f'azureblockblob://AzureCliCredential@{HOST}?tenant_id=a_b', 'tenant_id must be an id or a domain'),
    (f'{DEFAULT}{HOST}?read_timeout=soon', 'read_timeout must be a number of seconds, more than 0'),
    (f'{DEFAULT}{HOST}?max_concurrency=0', 'max_concurrency must be a whole number, 1 or more'),
    (f'{DEFAULT}{HOST}?container_name=Results', 'container_name must have 3 to 63 characters'),
    (f'{DEFAULT}{HOST}?base_path=a%5Cb', 'base_path must hold no backslash'),
    (f'azureblockblob://{HOST}?credential=make', 'credential must be a TokenCredential, a callable'),
]

#: URLs that are refused once their identity is looked at, settings of the app, and what is said.
WRONG_IDENTITY = [
    (f'azureblockblob://{HOST}', None, 'holds no identity. Name a credential before the account (DefaultAzure'),
    ('azureblockblob://myaccount', None, 'or set azureblockblob_credential'),
    (STRING, None, 'holds no identity'),
    (ENDPOINT + HOST, None, 'holds no identity'),
    (DEFAULT + HOST, 'set', 'two identities at once: the URL holds one, and azureblockblob_credential is set'),
    (f'{DEFAULT}{HOST}?credential=azure.identity.AzureCliCredential', None, 'two identities at once'),
    (BY_KEY + HOST, 'set', 'two identities at once'),
    (f'{STRING};AccountKey={KEY}', 'set', 'two identities at once'),
    (f'{ENDPOINT}{HOST};SharedAccessSignature={SAS}', 'set', 'two identities at once'),
    ('azureblockblob://UseDevelopmentStorage=true', 'set', 'two identities at once'),
    (f'azureblockblob://{EMULATOR}', 'set', 'azureblockblob_credential sends tokens, which Azure takes over https'),
    (f'{MANAGED}{HOST}?client_id=a&object_id=b', None, 'two identities at once: ManagedIdentityCredential takes'),
    (f'{MANAGED}{HOST}?object_id=a&resource_id=b', None, 'only one of client_id, object_id, resource_id'),
    (f'{DEFAULT}{HOST}?client_id=a&managed_identity_client_id=b', None, 'two identities at once'),
    (f'{DEFAULT}{HOST}?workload_identity_client_id=a&client_id=b', None, 'two identities at once'),
    (f'{DEFAULT}{HOST}?' + '&'.join(f'{option}=1' for option in CREDENTIAL_OPTIONS['DefaultAzureCredential']
                                    if option.startswith('exclude_')), None, 'all its members are excluded'),
    (f'azureblockblob://CertificateCredential@{HOST}', None, 'in the URL: tenant_id, client_id, certificate_path'),
    (f'azureblockblob://CertificateCredential@{HOST}?tenant_id=a&client_id=b', None, 'URL: certificate_path.'),
]


def give_credential():
    """Stand where a credential is configured; nobody calls it."""
    raise AssertionError('Nothing asks for a token when a backend is built.')


def build(url, credential=None, **settings):
    app = Celery('azure', set_as_current=False)
    app.conf.update(azureblockblob_credential=credential, **settings)
    return AzureBlockBlobBackend(app=app, url=url)


def said_of(url):
    """Return what a URL is read as, without what is empty."""
    parsed = parse_url(url, CREDENTIAL_OPTIONS)
    said = {name: getattr(parsed, name) for name in parsed.__dataclass_fields__ if name != 'text'}
    return {name: value for name, value in said.items() if value}


class test_RightURLs:

    @pytest.mark.parametrize(('url', 'meaning'), RIGHT + RIGHT_WITH_SETTING)
    def test_each_means_what_it_says(self, url, meaning):
        assert said_of(url) == {'account_url': HOST, **meaning}

    @pytest.mark.parametrize('url', [url for url, _ in RIGHT])
    def test_each_makes_a_backend_that_gives_it_back(self, url):
        assert build(url).as_uri(include_password=True) == url

    @pytest.mark.parametrize('url', [url for url, _ in RIGHT_WITH_SETTING])
    def test_an_account_alone_makes_one_with_the_setting(self, url):
        assert build(url, give_credential).as_uri(include_password=True) == url

    @pytest.mark.parametrize('form', re.findall(r'^  (\S+)', ACCEPTED_FORMS, re.MULTILINE))
    def test_each_form_that_errors_recommend_is_accepted(self, form):
        for placeholder, value in (('ACCOUNT_NAME', 'myaccount'), ('ACCOUNT_KEY', KEY), ('=KEY', f'={KEY}'),
                                   ('ACCOUNT', 'myaccount'), ('CLIENT_ID', 'a-1'), ('=SAS', f'={SAS}')):
            form = form.replace(placeholder, value)
        assert parse_url(form, CREDENTIAL_OPTIONS).account_url == HOST

    @pytest.mark.parametrize('name', CREDENTIALS)
    def test_each_credential_takes_each_setting(self, name):
        values = {'container_name': 'results', 'base_path': 'a', 'credential': 'azure.identity.AzureCliCredential',
                  'native_chords': 'true'}
        for setting in SETTINGS:
            url = f'azureblockblob://{name}@{HOST}?{setting}={values.get(setting, 7)}'
            assert setting in parse_url(url, CREDENTIAL_OPTIONS).settings

    def test_no_name_is_both_an_option_and_a_setting(self):
        assert not set(SETTINGS).intersection(*CREDENTIAL_OPTIONS.values())

    def test_the_value_cannot_be_changed(self):
        parsed = parse_url(f'{DEFAULT}{HOST}?client_id=a', CREDENTIAL_OPTIONS)
        with pytest.raises(AttributeError):
            parsed.account_url = 'https://other'
        with pytest.raises(TypeError):
            parsed.options['client_id'] = 'b'

    @pytest.mark.parametrize(('configured', 'account_url'), [
        ('azureblockblob+https://DefaultAzureCredential@myaccount.blob.core.windows.net', HOST),
        (f'azureblockblob+https://myaccount:{KEY}@{HOST}', HOST),
        (f'azureblockblob+http://devstoreaccount1:{DEVELOPMENT_KEY}@127.0.0.1:10000/devstoreaccount1', EMULATOR),
        (f'azureblockblob://DefaultAzureCredential@{HOST}', HOST),
    ])
    def test_an_app_takes_both_schemes(self, configured, account_url):
        app = Celery('azure', set_as_current=False, backend=configured)
        assert isinstance(app.backend, AzureBlockBlobBackend)
        assert said_of(app.backend.as_uri(include_password=True))['account_url'] == account_url


class test_WrongURLs:

    @pytest.mark.parametrize(('url', 'message'), WRONG)
    def test_each_is_refused_with_what_is_wrong(self, url, message):
        with pytest.raises(ImproperlyConfigured, match=re.escape(message)):
            parse_url(url, CREDENTIAL_OPTIONS)

    @pytest.mark.parametrize(('url', 'message'), WRONG)
    def test_each_is_refused_by_the_backend(self, url, message):
        with pytest.raises(ImproperlyConfigured, match=re.escape(message)):
            build(url)

    @pytest.mark.parametrize(('url', 'credential', 'message'), WRONG_IDENTITY)
    def test_each_wrong_identity_is_refused_by_the_backend(self, url, credential, message):
        with pytest.raises(ImproperlyConfigured, match=re.escape(message)):
            build(url, give_credential if credential else None)

    @pytest.mark.parametrize('url', [url for url, _ in WRONG])
    def test_no_error_shows_what_it_was_found_with(self, url):
        with pytest.raises(ImproperlyConfigured) as caught:
            build(url)
        assert caught.value.__cause__ is None
        assert caught.value.__context__ is None or caught.value.__suppress_context__

    @pytest.mark.parametrize('url', ['', 'azureblockblob://myaccount', DEFAULT, f'azureblockblob://foo@{HOST}'])
    def test_an_error_shows_the_accepted_forms(self, url):
        with pytest.raises(ImproperlyConfigured, match=re.escape(ACCEPTED_FORMS)):
            build(url)

    @pytest.mark.parametrize('option', ['read_timeout', 'container_name', 'base_path', 'client_id'])
    def test_an_error_does_not_repeat_a_value(self, option):
        with pytest.raises(ImproperlyConfigured) as caught:
            build(f'{DEFAULT}{HOST}?{option}=\u20acwrong%5C')
        assert 'wrong' not in str(caught.value)

    @pytest.mark.parametrize('name', CREDENTIALS)
    def test_no_credential_goes_over_http(self, name):
        with pytest.raises(ImproperlyConfigured, match='over https only'):
            build(f'azureblockblob://{name}@{EMULATOR}')


class test_MissingLibraries:

    @pytest.mark.parametrize('url', [DEFAULT + HOST, BY_KEY + HOST])
    def test_without_azure_storage_blob_the_error_says_what_to_install(self, url, monkeypatch):
        monkeypatch.setitem(sys.modules, 'azure.storage.blob', None)
        with pytest.raises(ImproperlyConfigured, match='pip install azure-storage-blob'):
            build(url)

    def test_without_azure_identity_a_credential_cannot_be_used(self, monkeypatch):
        monkeypatch.setitem(sys.modules, 'azure.identity', None)
        with pytest.raises(ImproperlyConfigured, match='pip install azure-identity'):
            build(DEFAULT + HOST)

    @pytest.mark.parametrize('url', [BY_KEY + HOST, f'{ENDPOINT}{HOST};SharedAccessSignature={SAS}'])
    def test_without_azure_identity_keys_and_signatures_can(self, url, monkeypatch):
        monkeypatch.setitem(sys.modules, 'azure.identity', None)
        assert build(url).as_uri(include_password=True) == url

    def test_nothing_of_azure_is_needed_to_import_the_backend(self):
        # A process of its own: the modules that have been imported here hold parts of Azure's.
        code = (
            'import sys\n'
            'sys.modules["azure"] = None\n'
            'import celery.backends\n'
            f'celery.backends.__path__.insert(0, {str(Path(azureblockblob.__file__).parent)!r})\n'
            'from celery import Celery\n'
            'from celery.backends.azureblockblob import AzureBlockBlobBackend\n'
            f'AzureBlockBlobBackend(app=Celery(), url={DEFAULT + HOST!r})\n')
        done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        assert done.stderr.strip().splitlines()[-1].endswith('pip install azure-storage-blob')
