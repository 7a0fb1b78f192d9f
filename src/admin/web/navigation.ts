/** Where the page stands, and how it goes elsewhere. */
import { useEffect, useState } from 'preact/hooks';
import { type Address, parseAddress } from './address.ts';

export function useAddress(): Address {
  const [address, setAddress] = useState(() => parseAddress(location.hash));
  useEffect(() => {
    const read = (): void => setAddress(parseAddress(location.hash));
    addEventListener('hashchange', read);
    return () => removeEventListener('hashchange', read);
  }, []);
  return address;
}

/** Goes there; the way back leads to where one was. */
export function goTo(address: string): void {
  location.hash = address;
}

/** Changes the address of what is shown already: no step of the way back. */
export function amend(address: string): void {
  if (location.hash === address) return;
  history.replaceState(null, '', address);
  dispatchEvent(new HashChangeEvent('hashchange'));
}
