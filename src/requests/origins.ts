/** Which web pages may call: both doors ask here. */

export interface AllowedOrigins {
  /** Compared byte for byte with what browsers send. */
  listed: readonly string[];
  /** Whether pages of this machine are allowed too, on any port. */
  loopback: boolean;
}

/** @param origin the request's header; without it the caller is no browser, and no page is behind it */
export function isOriginAllowed(origins: AllowedOrigins, origin: string | undefined): boolean {
  if (origin === undefined || origins.listed.includes(origin)) return true;
  return origins.loopback && isLoopback(origin);
}

function isLoopback(origin: string): boolean {
  const url = URL.canParse(origin) ? new URL(origin) : null;
  // Browsers have one spelling; whatever else comes is not from a browser and is not worth a guess.
  if (url === null || url.origin !== origin || !/^https?:$/.test(url.protocol)) return false;
  return (
    url.hostname === 'localhost' || url.hostname === '[::1]' || /^127(?:\.\d{1,3}){3}$/.test(url.hostname)
  );
}
